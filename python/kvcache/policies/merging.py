"""What the policies that merge share: lists of entries, nearest keys, weighted means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .axes import Merged
from .budget import FAR
from .h2o import H2O

if TYPE_CHECKING:
    from ..layer_state import LayerView

_PAIRS = 2**22  # (entry that leaves, entry that stays) compared at once

#: Cosines as near as this are equal: a token that occurs twice has the same key in the first layer, but for rounding.
ROUNDING = 1e-5


def listed(some: Tensor, positions: Tensor) -> Tensor:
    """Slots of the entries ``some`` [R, H, C] bool in the order of their ``positions`` [R, H, C]: [R, H, m] int64, -1
    where a head has fewer than the most."""
    width = int(some.sum(-1).max())
    order = torch.where(some, positions, FAR).argsort(dim=2)[..., :width]
    return torch.where(some.gather(2, order), order, -1)


def blocks(leave: Tensor, stay: Tensor) -> Iterator[slice]:
    """``leave`` [R, H, E] cut along E, so that a number for each pair with ``stay`` [R, H, K] takes little memory."""
    size = max(_PAIRS // max(stay.numel(), 1), 1)
    for start in range(0, leave.shape[2], size):
        yield slice(start, start + size)


def nearest(leave: Tensor, stay: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine [R, H, e] of keys ``leave`` [R, H, e, D] with keys ``stay`` [R, H, K, D], and where it is, int64;
    ``stays`` [R, H, K] bool: which of them count."""
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (leave, stay))
    similarity = (a @ b.transpose(2, 3)).masked_fill(~stays[:, :, None], float("-inf"))
    best = similarity.amax(-1)
    # The first among equals, however the products were rounded.
    return best, (similarity >= best[..., None] - ROUNDING).int().argmax(-1)


@dataclass(frozen=True)
class _MergesIntoNearest(H2O):
    """Evicts as H2O does and folds what leaves into the kept entry with the most similar key, keys and values alike.

    Keys are compared and averaged without the rotation of their positions, and what comes of it is at the place of the
    kept entry: (x + sum of w_e x_e) / (1 + sum of w_e) over the entries e that go there, w_e from :meth:`weights`.
    """

    merges_keys = True

    def weights(self, layer: LayerView, leaves: Tensor, cosine: Tensor, keys: Tensor, pivots: Tensor) -> Tensor:
        """Weight [R, H, E] of entries beside the kept one's 1. ``leaves`` [R, H, E] bool: which there are; ``cosine``
        [R, H, E] with the kept entry that is nearest; ``keys`` [R, H, E, D], and those of the kept, ``pivots``."""
        raise NotImplementedError

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged:
        leave, stay = listed(evicted, layer.positions), listed(kept, layer.positions)
        leaves, stays = leave >= 0, stay >= 0
        parts = list(blocks(leave, stay))
        keys, old = layer.plain_keys_at(leave), layer.plain_keys_at(stay)
        found = [nearest(keys[:, :, part], old, stays) for part in parts]
        cosine, target = (torch.cat(x, 2) for x in zip(*found))
        pivots = old.gather(2, target[..., None].expand_as(keys))
        weights = self.weights(layer, leaves, cosine, keys, pivots)
        weights = torch.where(leaves & stays.gather(2, target), weights, 0.0)
        values, own = layer.values_at(leave), layer.values_at(stay)
        place = torch.arange(stay.shape[2], device=stay.device)
        more_keys, more_values, total = torch.zeros_like(old), torch.zeros_like(own), torch.zeros_like(old[..., 0])
        for part in parts:  # sums by a product of matrices: adding by index has no order on a GPU
            share = torch.where(target[:, :, part, None] == place, weights[:, :, part, None], 0.0).transpose(2, 3)
            more_keys += share @ keys[:, :, part]
            more_values += share @ values[:, :, part]
            total += share.sum(-1)
        whole = 1 + total[..., None]
        return Merged(torch.where(total > 0, stay, -1), (old + more_keys) / whole, (own + more_values) / whole)
