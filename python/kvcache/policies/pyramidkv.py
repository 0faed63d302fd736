"""PyramidKV: SnapKV with larger budgets in lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .budget import check_count
from .card import Card
from .observation import _ObservationWindow

if TYPE_CHECKING:
    from ..layer_state import LayerView


@lru_cache(maxsize=4096)
def pyramid(entries: int, layers: int, beta: int) -> tuple[int, ...]:
    """``layers`` * ``entries`` shared out: falling linearly from 2 * entries - entries / beta to entries / beta.

    Shares are rounded down, and what is left goes to the largest remainders (the lowest layers among equals), so that
    the total is exact. The official code rounds the slope instead, which overspends: reference/papers.md, section 9.
    """
    if layers == 1:
        return (entries,)
    whole = beta * (layers - 1)
    shares = [entries * ((2 * beta - 1) * (layers - 1) - (2 * beta - 2) * i) for i in range(layers)]
    found = [x // whole for x in shares]
    by_remainder = sorted(range(layers), key=lambda i: (-(shares[i] % whole), i))
    for i in by_remainder[: layers * entries - sum(found)]:
        found[i] += 1
    return tuple(found)


@dataclass(frozen=True)
class PyramidKV(_ObservationWindow):
    """SnapKV with a budget of its own for every layer, largest in the lowest (arXiv 2406.02069, section 4).

    Beside its ``window``, layer i of L keeps a share of L * (``keep`` - ``window``) entries per kv head that falls
    linearly from the first layer to the last, which keeps (``keep`` - ``window``) / ``beta``; the mean over the layers
    is exactly ``keep``. A layer that holds fewer than its share keeps all, and leaves the rest to nobody; so does a
    layer with a sliding window, whose budget that window bounds.

    Arguments
        keep: entries per kv head, the mean over all layers.
        beta: how steep; 1 gives all layers the same.
        window, pool, pooling, generated: as in :class:`SnapKV`.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2406.02069, section 4",
        rule=(
            "SnapKV's scores; layer l keeps from 2(C - W) - (C - W)/`beta` (first) down to (C - W)/`beta` (last) "
            "beside the window, exactly C on average."
        ),
        holds="`keep` on average over layers",
        cost="nothing after the prompt",
        use="As SnapKV, at small budgets.",
    )

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("beta", self.beta, 1)

    def allocate(self, layer: LayerView) -> Tensor:
        recent = self.allocate_recent(layer).tolist()
        kept = self._resolve(self.keep, layer).clamp(min=1).tolist()
        layers = layer.num_layers
        budgets = [r + pyramid(n - r, layers, self.beta)[layer.index] for n, r in zip(kept, recent, strict=True)]
        return torch.tensor(budgets, dtype=torch.int32)
