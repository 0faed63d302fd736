"""Drives one layer of an engine with keys and queries made by hand, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache.engine import Engine
from kvcache.step import Attention


def engine(policy, window=None, **options) -> Engine:
    return Engine(policy, [window], **{"page_size": 4, "kv_dtype": None, "max_tokens": None, **options})


def step(e: Engine, q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """One forward of one layer: q [R, Hq, T, D], k, v [R, H, T, D]; returns the output [R, T, Hq, D]."""
    (layer,) = e.layers
    e.begin(q.shape[0], q.shape[2], None)
    e.append(layer, k, v, e.step)
    layer.new = (k, v)
    out = e.attend(layer, q, Attention(scale=scale))
    e.finish()
    return out


def unit(position: int, dim: int = 8) -> Tensor:
    """The key of a token that only channel ``position`` of a query meets, [1, 1, 1, dim]."""
    return torch.eye(dim)[position].view(1, 1, 1, dim)


def held(e: Engine, head: int = 0) -> list[int]:
    store = e.layers[0].store
    return sorted(store.positions[0, head, : int(store.counts[0, head])].tolist())


def scores(e: Engine, head: int = 0) -> dict[int, float]:
    """Position -> score."""
    store = e.layers[0].store
    n = int(store.counts[0, head])
    values = store.columns[0][0, head, :n].tolist()
    return dict(sorted(zip(store.positions[0, head, :n].tolist(), values)))
