"""CriticalKV: half of the budget by attention, the rest by what attention would bring into the hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .card import Card
from .observation import _ObservationWindow

if TYPE_CHECKING:
    from ..layer_state import LayerView

#: What the paper adds to every score of the second half, so that an entry without attention has its value's say.
EPSILON = 1e-4
#: Most numbers of projected values that are held at once.
AT_ONCE = 2**24


@dataclass(frozen=True)
class CriticalKV(_ObservationWindow):
    """SnapKV with a second criterion for a part of the budget (arXiv 2502.03805, Algorithm 1; kvpress's
    CriticalKVPress).

    Beside the ``window``, a share of the entries stays by the attention s that SnapKV scores them with. The others
    stay by a bound of what their loss would change in the layer's output,

        (s + 1e-4) * ||W_o v||_1,

    where W_o is the part of the model's output projection that belongs to a query head; the norm is the mean over the
    query heads of a kv head.

    Arguments
        keep: entries per kv head at the end of a prompt, as in :class:`SnapKV`.
        share: of ``keep`` - ``window``, the part in [0, 1] that stays by attention alone, rounded down (paper: 0.5); 1
            is SnapKV.
        window, pool, pooling, generated: as in :class:`SnapKV`.

    s is the mean over the window's queries, as 1e-4 is measured against it. The norm is taken once, when a token is
    stored, which costs what the output projection of the layer costs. Models whose output projection is not known, or
    does not read the values that are cached, are refused at ``wrap``.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2502.03805, Algorithm 1; kvpress",
        rule=(
            "SnapKV's scores s; beside the window, `share` of `keep - window` by s, the others by "
            "(s + 1e-4) ‖W_o v‖₁, group mean of the norms."
        ),
        holds="`keep` of the prompt, and what is generated",
        cost="the norm of the new token's projected value",
        use="As SnapKV, where values differ much in what they bring.",
    )

    share: float = 0.5

    columns: ClassVar[tuple[str, ...]] = ("projected",)
    needs_output_projection: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise ValueError(f"share must be a share in [0, 1], got {self.share!r}")

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        rows, heads, _, size = values.shape
        weight = layer.output_projection.unflatten(0, (heads, -1, size))  # [heads, group, size, hidden]
        group, hidden = weight.shape[1], weight.shape[3]
        norms = []
        for part in values.split(max(AT_ONCE // (rows * heads * hidden), 1), 2):
            of_heads = [(part @ weight[:, g]).abs().sum(-1, dtype=torch.float32) for g in range(group)]
            norms.append(torch.stack(of_heads).mean(0))
        return {"projected": torch.cat(norms, 2)}

    def score(self, layer: LayerView) -> Tensor:
        recent = layer.recent
        assert recent is not None  # fixed before anything leaves
        pooled, order = self.in_order(layer, recent)
        end = (layer.tokens - recent)[:, None, None]
        pooled = pooled.masked_fill(layer.positions.gather(2, order) >= end, float("-inf"))  # it stays in any case
        first = (self.share * (layer.budgets - recent[:, None]).double()).floor()
        rank = pooled.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        worth = (pooled / self.window + EPSILON) * layer.column("projected").gather(2, order)
        worth = torch.where(rank < first[..., None], float("inf"), worth)
        return torch.zeros_like(worth).scatter_(2, order, worth)
