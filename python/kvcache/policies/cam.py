"""CaM: values of what leaves are spread over the entries behind it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .axes import Merged
from .budget import FAR, check_count
from .card import Card
from .h2o import H2O
from .hashing import BOUND, hashed
from .merging import blocks, listed

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class CaM(H2O):
    """Evict as H2O does, and add the value of what leaves to the entries behind it (Cache Merging, ICML 2024; kvpress).

    An entry i that leaves merges with probability min(A_i / A, 1), where A_i is the attention that it has received so
    far (H2O's score) and A the mean over the next ``spread`` entries that stay. Then v_i / ``spread`` is added to the
    value of each of these. Keys stay as they are, so that positions do not matter.

    Arguments
        heavy, recent, group: as in H2O.
        spread: entries that share a value (official code: 32). The newest ones have fewer behind them, and the rest of
            the value is lost with them.
        seed: chance is a hash of seed, layer, head and position: the same in every batch and for every chunking.

    In a layer with a sliding window nothing is merged.
    """

    card: ClassVar[Card | None] = Card(
        source="CaM, ICML 2024; kvpress",
        rule=(
            "As `h2o`; with probability min(s_i / mean s of the next `spread` that stay, 1) what leaves adds "
            "v_i / `spread` to the value of each of them."
        ),
        holds="`heavy + recent`",
        cost="H2O's, reading scores and values once more, writing `spread` values; no graph",
        use="As H2O, where outputs should change less at an eviction; keys stay as they are.",
    )

    spread: int = 32
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("spread", self.spread, 1)
        check_count("seed", self.seed)

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged:
        positions = layer.positions
        leave, stay = listed(evicted, positions), listed(kept, positions)
        leaves, stays = leave >= 0, stay >= 0
        attention, chance, p = (
            x.gather(2, leave.clamp(min=0)) for x in (layer.scores, hashed(layer, self.seed) / BOUND, positions)
        )
        received = torch.where(stays, layer.scores.gather(2, stay.clamp(min=0)), 0.0)
        behind = torch.where(stays, positions.gather(2, stay.clamp(min=0)), FAR)
        first = torch.searchsorted(behind, p)
        values, own = layer.values_at(leave), layer.values_at(stay)
        place, total, changes = torch.arange(stay.shape[2], device=p.device), torch.zeros_like(own), stay < 0
        for part in blocks(leave, stay):
            start = first[:, :, part, None]
            near = (place >= start) & (place < start + self.spread) & stays[:, :, None]
            mean = (near * received[:, :, None]).sum(-1) / near.sum(-1)
            probability = (attention[:, :, part] / mean).nan_to_num(nan=0.0)  # NaN: nobody behind, or no attention
            near &= (leaves[:, :, part] & (chance[:, :, part] < probability))[..., None]
            total += near.float().transpose(2, 3) @ values[:, :, part]
            changes |= near.any(2)
        return Merged(torch.where(changes, stay, -1), values=own + total / self.spread)
