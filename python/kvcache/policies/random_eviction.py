"""Random eviction: the baseline that every scored policy must beat."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .budget import Budget, check_count
from .card import Card
from .hashing import hashed
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class RandomEviction(_Keeping):
    """Keep a uniformly random subset of each kv head's entries, the first ``sinks`` and the last ``recent`` for sure.

    The priority of an entry is a hash of (seed, layer, head, position), so that the outcome depends neither on the
    batch nor on how the prompt is cut into chunks.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        sinks, recent: protected entries, part of ``keep``.
        seed: another seed keeps another subset.
    """

    card: ClassVar[Card | None] = Card(
        source="baseline",
        rule=("A hash of row, layer, head, position and `seed` decides; the first `sinks` and the last `recent` stay."),
        holds="`keep`",
        cost="choosing one victim per head",
        use="As what any policy has to beat.",
    )

    keep: Budget = 0.2
    _: KW_ONLY
    sinks: int = 0
    recent: Budget = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed)

    def score(self, layer: LayerView) -> Tensor:
        return hashed(layer, self.seed)
