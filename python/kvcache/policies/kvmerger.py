"""KVMerger: what leaves goes into the most similar entry, by a Gaussian kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .card import Card
from .merging import _MergesIntoNearest

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class KVMerger(_MergesIntoNearest):
    """Evict as H2O does, and merge what leaves into the kept entry with the most similar key, its pivot, by a Gaussian
    kernel (arXiv 2407.08454; as a part of eviction: LOOK-M, arXiv 2406.18139, and KVCache-Factory's ``merge_kv``).

    The weight of an entry e beside the 1 of its pivot p is exp(-|k_e - k_p|^2 / (2 s^2)), s = ``bandwidth`` |k_p|;
    weights are divided by their sum. Keys are compared and averaged without the rotation of their positions, and stand
    at the position of the pivot.

    Arguments
        heavy, recent, group: as in H2O.
        bandwidth: width of the kernel, as a share of the length of the pivot's key (ours: it makes the weight of one
            entry that leaves depend on its distance alone).

    In a layer with a sliding window nothing is merged.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2407.08454; arXiv 2406.18139",
        rule=(
            "As `h2o`; what leaves goes into the kept entry of largest cosine, p, with weight "
            "exp(-‖k - k_p‖² / (2 s²)) beside 1, s = `bandwidth` ‖k_p‖."
        ),
        holds="`heavy + recent`",
        cost="H2O's, reading all keys and values; no graph",
        use="As D2O, with weights that fall smoothly instead of a threshold.",
    )

    bandwidth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bandwidth, bool) or not isinstance(self.bandwidth, (int, float)):
            raise TypeError(f"bandwidth must be a number, got {self.bandwidth!r}")
        if not 0 < self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth must be more than 0 and finite, got {self.bandwidth}")

    def weights(self, layer: LayerView, leaves: Tensor, cosine: Tensor, keys: Tensor, pivots: Tensor) -> Tensor:
        width = pivots.square().sum(-1) * self.bandwidth**2
        return (-(keys - pivots).square().sum(-1) / (2 * width)).exp()
