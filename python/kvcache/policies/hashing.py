"""Chance that depends neither on the batch nor on how a prompt is cut into chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..layer_state import LayerView

_MULTIPLIER = 0x9E3779B1  # odd, so that multiplication mod 2^32 permutes

#: What :func:`hashed` stays below.
BOUND = 2**24


def hashed(layer: LayerView, seed: int) -> Tensor:
    """A hash of (seed, layer, head, position) of every slot, [rows, heads, capacity] float32, whole numbers below 2^24,
    which float32 holds exactly."""
    head = torch.arange(layer.heads, device=layer.positions.device)[None, :, None]
    x = layer.positions.long() + ((seed * 1009 + layer.index) * 257 + head) * 0x10001
    for shift in (16, 15, 16):
        x = (x ^ (x >> shift)) * _MULTIPLIER & 0xFFFFFFFF
    return (x >> 8).float()
