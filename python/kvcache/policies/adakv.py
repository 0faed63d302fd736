"""AdaKV: SnapKV with budgets that the heads of a layer compete for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .card import Card
from .observation import _ObservationWindow

if TYPE_CHECKING:
    from ..layer_state import LayerView


def share_out(scores: Tensor, total: Tensor, floor: Tensor) -> Tensor:
    """How many entries of each head are among the best of all heads, [rows, heads] int32.

    ``scores`` [rows, heads, n] float32, -inf where there is no entry; ``total``, ``floor`` [rows] int: entries of all
    heads together, and how many of its best every head has for sure. Among equals the lowest index wins.
    """
    rows, heads, n = scores.shape
    rank = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    sure = (rank < floor[:, None, None]) & (scores > float("-inf"))
    best = scores.masked_fill(sure, float("inf")).flatten(1).sort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(heads * n, device=scores.device) < total[:, None]) & (best.values > float("-inf"))
    counts = torch.zeros(rows, heads, dtype=torch.int32, device=scores.device)
    return counts.scatter_add_(1, best.indices // n, chosen.int())


@dataclass(frozen=True)
class AdaKV(_ObservationWindow):
    """SnapKV with a budget of its own for every kv head (arXiv 2407.11550, Algorithm 1).

    The heads of a layer keep, beside the ``window`` of each, the best heads * (``keep`` - ``window``) entries of all of
    them together, by SnapKV's score: heads that attend to few entries leave room to those that attend to many. Every
    head has the share ``floor`` of an even budget for sure. What a head does not keep is freed: pages belong to heads.

    Arguments
        keep: entries per kv head, the mean over the heads of a layer.
        floor: share in [0, 1] of ``keep`` - ``window`` that every head has for sure (paper: 0.2), rounded down; 1 is
            SnapKV.
        window, pool, pooling, generated: as in :class:`SnapKV`.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2407.11550, Algorithm 1",
        rule="SnapKV's scores; the best of all heads of a layer together, `floor` of an even share for sure.",
        holds="`keep` on average over the heads of a layer; what a head gives up is freed",
        cost="nothing after the prompt",
        use="As SnapKV; heads that look at much get more.",
    )

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be a share in [0, 1], got {self.floor!r}")

    def allocate(self, layer: LayerView) -> Tensor:
        recent = self.allocate_recent(layer)
        even = self._resolve(self.keep, layer).clamp(min=1) - recent
        sure = torch.tensor([int(self.floor * n) for n in even.tolist()])
        recent, even, sure = (x.to(layer.device) for x in (recent, even, sure))
        # The window has no score and is no candidate: every head keeps its own.
        pooled, order = self.in_order(layer, recent)
        end = (layer.tokens - recent)[:, None, None]
        pooled = pooled.masked_fill(layer.positions.gather(2, order) >= end, float("-inf"))
        pooled = layer.all_heads_of(pooled, float("-inf"))
        heads = pooled.shape[1]
        shares = share_out(pooled, heads * even, sure)
        # What a short prompt leaves of the budget goes to all alike: generated tokens may need it.
        spare = (heads * even - shares.sum(1))[:, None]
        shares += spare // heads + (torch.arange(heads, device=spare.device) < spare % heads)
        return layer.own_heads_of(shares + recent[:, None]).clamp(min=1)
