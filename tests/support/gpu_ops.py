"""The ops on a GPU, called with CPU tensors: arguments go over, results and what was written come back.

So every test of the ops runs unchanged against the CUDA kernels, and its fuzzed storage stays in one place.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor


class GpuOps:
    """A namespace for ``ops.register_backend``."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        op = getattr(torch.ops.kvcache, name).default
        arguments = op._schema.arguments
        writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        places = {a.name: i for i, a in enumerate(arguments)}

        def call(*args, **kwargs):
            carried: dict[int, Tensor] = {}  # one tensor given twice stays one tensor
            given = [(i, x) for i, x in enumerate(args)] + [(places[k], x) for k, x in kwargs.items()]
            on_gpu = [_carry(x, carried) for _, x in given]
            out = op(*on_gpu[: len(args)], **dict(zip(kwargs, on_gpu[len(args) :])))
            for (i, x), y in zip(given, on_gpu):
                if writes[i] and isinstance(x, (Tensor, list, tuple)):
                    for mine, written in zip(x, y) if not isinstance(x, Tensor) else [(x, y)]:
                        mine.copy_(written)
            if isinstance(out, tuple):
                return tuple(x.cpu() for x in out)
            return None if out is None else out.cpu()

        return SimpleNamespace(default=call)


def _carry(x, carried):
    """``x`` on the GPU, with its strides where they can be kept."""
    if isinstance(x, (list, tuple)):
        return [_carry(y, carried) for y in x]
    if not isinstance(x, Tensor):
        return x
    if id(x) not in carried:
        if 0 in x.stride() or x.numel() == 0:
            carried[id(x)] = x.cuda()
        else:
            carried[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
    return carried[id(x)]
