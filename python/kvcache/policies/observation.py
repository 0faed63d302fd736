"""What the policies of an observation window share: arguments, and the attention of the window, pooled."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .budget import FAR, Budget, check_pool, check_window
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class _ObservationWindow(_Keeping):
    """A prompt is compressed by what its last ``window`` queries attend to; the window itself stays.

    ``keep`` entries per kv head, the window among them; of a prompt whose budget is no larger than the window the
    newest ``keep`` stay. Subclasses say how ``keep`` is shared out among layers or heads.
    """

    keep: Budget = 2048
    window: int = 32
    pool: int = 5
    _: KW_ONLY
    pooling: str = "avg"
    generated: str = "keep"

    needs: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.keep)
        check_pool(self.pool)
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling must be 'avg' or 'max', got {self.pooling!r}")
        if self.generated not in ("keep", "evict"):
            raise ValueError(f"generated must be 'keep' or 'evict', got {self.generated!r}")

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.window

    def allocate_recent(self, layer: LayerView) -> Tensor:
        return self._resolve(self.keep, layer).clamp(min=1, max=self.window)

    def score(self, layer: LayerView) -> Tensor:
        recent = layer.recent
        assert recent is not None  # fixed before anything leaves
        pooled, order = self.in_order(layer, recent)
        return torch.zeros_like(pooled).scatter_(2, order, pooled)

    def in_order(self, layer: LayerView, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled scores [rows, heads, capacity] of a head's entries in the order of their positions, -inf for slots
        without one, and the slot of each; entries among the newest ``recent`` [rows] have no part in it, as if 0."""
        live = layer.live
        end = (layer.tokens - recent)[:, None, None]
        scores = torch.where(live & (layer.positions < end), layer.scores, 0.0)
        order = torch.where(live, layer.positions, FAR).argsort(dim=2)
        scores = scores.gather(2, order)
        if self.pool > 1:
            shape, pad = scores.shape, self.pool // 2
            flat = scores.flatten(0, 1)[:, None]
            if self.pooling == "avg":
                flat = F.avg_pool1d(flat, self.pool, stride=1, padding=pad)
            else:
                flat = F.max_pool1d(flat, self.pool, stride=1, padding=pad)
            scores = flat.view(shape)
        # In this order a head's entries come first: as many places as there are live slots, which are the first ones.
        return scores.masked_fill(~live, float("-inf")), order
