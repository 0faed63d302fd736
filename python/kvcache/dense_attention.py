"""Causal attention over new tokens alone, dense: flash-attn where it is installed and fits, else torch's own."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LARGEST_HEAD = 256  # of flash-attn


@cache
def _flash_attn() -> Any | None:
    """``flash_attn_func``, or None where the package is missing or was built for another torch."""
    if find_spec("flash_attn") is None:
        return None
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, OSError, AttributeError):
        return None


@cache
def fast_types(device: str) -> tuple[torch.dtype, ...]:
    """The types in which torch's own causal attention beats this package's on a device of this type ("cpu", "cuda").

    On a GPU both half precisions: flash attention. On a CPU bfloat16 where the processor multiplies it in matrix tiles
    (AMX), which torch uses; without them our kernel was ahead where it was measured (docs/kernels.md: which types and
    lengths).
    """
    if device != "cpu":
        return torch.float16, torch.bfloat16
    ask = getattr(torch.cpu, "get_capabilities", None)  # not every supported torch has it
    tiles = ask().get("amx_bf16", False) if ask else torch.cpu._is_amx_tile_supported()
    return (torch.bfloat16,) if tiles else ()


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[R, Hq, T, D] of q [R, Hq, T, D] with k, v [R, H, T, D] of the same dtype, causal; scale multiplies q·k."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= LARGEST_HEAD
    if fits and _on_gpu(q) and (flash := _flash_attn()):
        out = flash(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=True)
        return out.transpose(1, 2)
    return scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
