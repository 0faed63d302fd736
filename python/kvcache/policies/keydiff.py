"""KeyDiff: keep the keys that differ most from the others."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .budget import Budget
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class KeyDiff(_Keeping):
    """Keep the keys least similar to the mean of their head's keys (arXiv 2504.15364).

    score_i = -cos(k_i, m), where m is the mean of k_j / ||k_j|| over the entries that the kv head holds at that moment,
    keys as the model rotated them. A prompt is scored when it is complete; with ``prefill="chunked"`` after every
    chunk, as in the paper.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        sinks, recent: first and newest entries that stay however similar, part of ``keep`` (paper: none).
        slack: entries by which a head may exceed ``keep`` while decoding before it is brought back to it. The mean
            changes with every token, so that an eviction reads all keys of the layer; it comes once in ``slack`` + 1
            tokens. With 0, as in the paper, every step evicts, and none is captured as a graph.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2504.15364",
        rule="-cos(k, mean of the normalised keys of the head): the `keep` keys most unlike the mean stay.",
        holds="`keep`, and up to `slack` more",
        cost="reading all keys, once in `slack + 1` steps",
        use="Without attention and queries; set `slack`.",
    )

    keep: Budget = 0.2
    sinks: int = 0
    recent: Budget = 0
    _: KW_ONLY
    slack: int = 0

    def score(self, layer: LayerView) -> Tensor:
        directions = torch.nn.functional.normalize(layer.keys().float(), dim=-1)  # dead slots are 0 and stay it
        mean = torch.nn.functional.normalize(directions.sum(2), dim=-1)  # its length does not matter
        similarity = (directions @ mean[..., None])[..., 0]
        return torch.nn.functional.pad(-similarity, (0, layer.capacity - similarity.shape[2]))
