"""TOVA: what the newest token attends to least leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .budget import Budget
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class TOVA(_Keeping):
    """Keep the entries to which the newest query attends most (arXiv 2401.06104, section 3.2).

    The score of an entry is the attention probability given by the newest query alone, the mean over all query heads
    of the layer, so that every kv head of a layer keeps the same entries. The lowest leaves at every step; the newest
    token may be the one, and the first tokens stay only as long as they are attended to. A prompt is read whole, and
    its last query decides what stays of it.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        sinks, recent: protected entries, part of ``keep``; the paper protects none.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2401.06104, section 3.2",
        rule="The `keep` entries to which the newest query attends most, mean over all heads of the layer.",
        holds="`keep`",
        cost="writing the step's probabilities, choosing one victim per layer",
        use="As H2O, without its bias to old entries; forgets what the newest query does not look at.",
    )

    keep: Budget = 512
    sinks: int = 0
    recent: Budget = 0

    needs: ClassVar[frozenset[str]] = frozenset({"last_attention"})

    def score(self, layer: LayerView) -> Tensor:
        # Heads have the same number of query heads, and entries the same slots in each: means are ordered as sums.
        total = layer.over_heads(layer.scores.sum(1, keepdim=True))
        return total.expand_as(layer.scores).contiguous()
