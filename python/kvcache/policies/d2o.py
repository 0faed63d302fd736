"""D2O: what leaves goes into the most similar entry, if it is similar enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .card import Card
from .merging import ROUNDING, _MergesIntoNearest

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class D2O(_MergesIntoNearest):
    """Evict as H2O does, and merge what leaves into the kept entry with the most similar key, or drop it (arXiv
    2406.13035; AIoT-MLSys-Lab/D2O).

    An entry merges if its cosine u with that key reaches a threshold of its head, the mean cosine of what left first
    (at the end of the prompt), then at every eviction

        threshold <- (1 - smoothing) threshold + smoothing mean(u).

    Its weight is exp(u) beside the exp(1) of the kept entry; weights are divided by their sum, unlike in the official
    code, whose mean shrinks values. Keys are compared and averaged without the rotation of their positions (the paper:
    with it), and stand at the position of the kept entry.

    Arguments
        heavy, recent, group: as in H2O. Every layer has the same budget: the paper's shares, by the variance of a
            layer's attention, are not part of kvcache.
        smoothing: weight of the newest eviction in the threshold, in (0, 1] (official code: 0.5).

    In a layer with a sliding window nothing is merged.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2406.13035",
        rule=(
            "As `h2o`; what leaves goes into the kept entry of largest cosine u with weight exp(u) beside exp(1), if u "
            "reaches a moving mean of such cosines."
        ),
        holds="`heavy + recent`",
        cost="H2O's, reading all keys and values; no graph",
        use="As H2O, where tokens that leave are like others that stay.",
    )

    smoothing: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.smoothing, bool) or not isinstance(self.smoothing, (int, float)):
            raise TypeError(f"smoothing must be a number, got {self.smoothing!r}")
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing must be in (0, 1], got {self.smoothing}")

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def weights(self, layer: LayerView, leaves: Tensor, cosine: Tensor, keys: Tensor, pivots: Tensor) -> Tensor:
        n, state = leaves.sum(-1), layer.state
        mean = torch.where(leaves, cosine, 0.0).sum(-1) / n.clamp(min=1)
        begun = state.get("begun", torch.zeros_like(n, dtype=torch.bool))
        before = state.get("threshold", mean)
        threshold = torch.where(begun, before + self.smoothing * (mean - before), mean)
        threshold = torch.where(n > 0, threshold, before)
        state.update(threshold=threshold, begun=begun | (n > 0))
        return torch.where(cosine >= threshold[..., None] - ROUNDING, (cosine - 1).exp(), 0.0)
