"""A policy's memory of a layer (``layer.state``): copies of it, and the memories of two batches as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def joined(mine: dict[str, Any], rows: int, theirs: dict[str, Any], more: int) -> dict[str, Any]:
    """A policy's memory of ``rows`` rows and of ``more`` rows as one.

    Tensors are joined along the row; a width that differs is filled up with -1 (integers) or 0, what one side lacks
    altogether with 0. A bool holds if it holds for both sides. Raises ValueError for other values that differ.
    """
    joined: dict[str, Any] = {}
    for name in {**mine, **theirs}:
        a, b = mine.get(name), theirs.get(name)
        some = a if isinstance(a, Tensor) else b
        if isinstance(some, Tensor):
            parts = [
                x if isinstance(x, Tensor) else some.new_zeros(n, *some.shape[1:]) for x, n in ((a, rows), (b, more))
            ]
            shape = [max(x, y) for x, y in zip(parts[0].shape[1:], parts[1].shape[1:], strict=True)]
            fill = -1 if some.dtype in (torch.int32, torch.int64) else 0
            pad = torch.nn.functional.pad
            joined[name] = torch.cat([pad(x, _padding(x.shape[1:], shape), value=fill) for x in parts])
        elif isinstance(a, bool) or isinstance(b, bool):
            joined[name] = bool(a) and bool(b)
        elif a == b:
            joined[name] = a
        else:
            raise ValueError(f"state {name!r} is {a!r} for some rows and {b!r} for others: they cannot be joined")
    return joined


def _padding(shape: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """What ``torch.nn.functional.pad`` needs to bring the last dimensions from ``shape`` to ``wanted``."""
    return [n for have, want in zip(reversed(shape), reversed(wanted), strict=True) for n in (0, want - have)]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
