"""Other kernels for the same work, where they are installed: torch SDPA, FlexAttention, FlashInfer, FlashAttention.

Each reads our pools' own memory, taken for the layout that it likes best, so that all rotate through the same bytes;
what it computes is checked against torch on what it takes the memory for. A text instead of a callable says why there
is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from common import NOT_INSTALLED, Pages
from devices import Bench, Run
from torch import Tensor


def module(*names: str) -> ModuleType | None:
    """The first of these that can be imported."""
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception:  # a broken installation raises anything
            continue
    return None


class Work:
    """T queries per row, causal with the last query at the last entry, over full heads of n entries."""

    def __init__(self, bench: Bench, q: list[Tensor], pages: list[Pages], scale: float) -> None:
        self.bench, self.q, self.pages, self.scale = bench, q, pages, scale
        self.rows, self.query_heads, self.tokens, self.dim = q[0].shape
        self.heads, self.width = pages[0].table.shape[1:]
        self.page_size = pages[0].k.shape[1]
        self.n = self.width * self.page_size
        self.group = self.query_heads // self.heads
        self.dtype = q[0].dtype

    def dense(self, c: int) -> tuple[Tensor, Tensor]:
        """[R, H, n, D]"""
        return self.pages[c].dense()

    def by_token(self, c: int) -> tuple[Tensor, Tensor]:
        """[R, n, H, D]"""
        shape = (self.rows, self.n, self.heads, self.dim)
        return self.pages[c].k.view(shape), self.pages[c].v.view(shape)

    def by_page(self, c: int) -> tuple[Tensor, Tensor]:
        """[pages, H, S, D]: a page holds all heads."""
        shape = (self.rows * self.width, self.heads, self.page_size, self.dim)
        return self.pages[c].k.view(shape), self.pages[c].v.view(shape)

    def by_paged_token(self, c: int) -> tuple[Tensor, Tensor]:
        """[pages, S, H, D]"""
        shape = (self.rows * self.width, self.page_size, self.heads, self.dim)
        return self.pages[c].k.view(shape), self.pages[c].v.view(shape)

    def truth(self, k: Tensor, v: Tensor) -> Tensor:
        """[R, T, Hq, D] of the first set's queries over keys and values [R, H, n, D], in float32, a row at a time."""
        q = self.q[0].float()
        hidden = torch.ones(self.tokens, self.n, dtype=torch.bool, device=q.device).triu(self.n - self.tokens + 1)
        rows = []
        for r in range(self.rows):
            grouped = q[r].view(self.heads, self.group, self.tokens, self.dim)
            logits = (grouped @ k[r].float()[:, None].transpose(-1, -2)) * self.scale
            out = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v[r].float()[:, None]
            rows.append(out.view(self.query_heads, self.tokens, self.dim).transpose(0, 1))
        return torch.stack(rows)

    def small(self) -> bool:
        """Whether the truth can be computed in passing."""
        return self.rows * self.query_heads * self.tokens * self.n <= 2**29

    def checked(self, run: Callable[[int], Tensor], logical: Callable[[], tuple[Tensor, Tensor]]) -> Run:
        """``run``, whose output has R * T * Hq * D elements in that order, if its first result is right."""
        try:
            out = run(0).float().reshape(self.rows, self.tokens, self.query_heads, self.dim)
            if self.small():
                error = float((out - self.truth(*logical())).abs().max())
                if not error < (1e-4 if self.dtype == torch.float32 else 4e-2):
                    return f"wrong by {error:.2g}"
        except Exception as error:
            return f"failed: {type(error).__name__}"
        return run


def attention_peers(work: Work, ours: Callable[[int], Tensor]) -> tuple[dict[str, Run], tuple[str, ...]]:
    """Contenders ``peer|way`` and the peers' names. ``ours``, with the tables in order, is held to the truth too."""
    if isinstance(right := work.checked(ours, lambda: work.dense(0)), str):
        raise AssertionError(f"ours: {right}")
    if work.bench.kind == "cpu":
        return cpu_ways(work), ("SDPA", "by hand") if work.tokens == 1 else ("SDPA",)
    runs: dict[str, Run] = {}
    for ways, names in FAMILIES:
        try:
            runs |= ways(work)
        except Exception as error:  # another version than this was written for
            runs |= {f"{name}|": f"failed: {type(error).__name__}" for name in names}
    return runs, tuple(name for _, names in FAMILIES for name in names)


def cpu_ways(work: Work) -> dict[str, Run]:
    """How models call SDPA: enable_gqa, or repeat_kv with its copy. "By hand", for one token: the group packed as the
    queries of one head, in SDPA or as two products and a softmax."""
    scale, group = work.scale, work.group

    def sdpa(c: int, repeat: bool) -> Tensor:
        k, v = work.dense(c)
        if repeat:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(
            work.q[c], k, v, is_causal=work.tokens == work.n, scale=scale, enable_gqa=not repeat
        ).transpose(1, 2)

    def packed(c: int, by_hand: bool) -> Tensor:
        k, v = work.dense(c)
        q = work.q[c].view(work.rows, work.heads, group, -1)
        if by_hand:
            return ((q @ k.transpose(-1, -2)) * scale).float().softmax(-1).to(v.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    ways: dict[str, Callable[[int], Tensor]] = {
        "SDPA|enable_gqa": lambda c: sdpa(c, False), "SDPA|repeat_kv": lambda c: sdpa(c, True),
    }  # fmt: skip
    if work.tokens == 1:
        ways |= {"by hand|packed": lambda c: packed(c, False), "by hand|matmul": lambda c: packed(c, True)}
    return {name: work.checked(way, lambda: work.dense(0)) for name, way in ways.items()}


def sdpa_ways(work: Work) -> dict[str, Run]:
    """torch's fused kernels; for one token also with the group packed as queries of one head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    causal: dict[str, Any] = {}
    if 1 < work.tokens < work.n:
        causal = {"attn_mask": causal_lower_right(work.tokens, work.n)}
    elif work.tokens == work.n:
        causal = {"is_causal": True}

    def call(c: int, backend: Any, pack: bool) -> Tensor:
        k, v = work.dense(c)
        q = work.q[c].view(work.rows, work.heads, work.group, -1) if pack else work.q[c]
        if work.bench.kind != "cuda":
            return F.scaled_dot_product_attention(q, k, v, scale=work.scale, enable_gqa=not pack, **causal)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=work.scale, enable_gqa=not pack, **causal)

    runs: dict[str, Run] = {}
    for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
        for way in ("enable_gqa", "packed") if work.tokens == 1 else ("enable_gqa",):
            run = lambda c, b=backend, p=way == "packed": call(c, b, p).transpose(1, 2)  # noqa: E731
            if way == "packed":
                run = lambda c, b=backend: call(c, b, True)  # noqa: E731
            runs[f"{name}|{way}"] = work.checked(run, lambda: work.dense(0))
    return runs


def flex_ways(work: Work) -> dict[str, Run]:
    if work.bench.kind != "cuda":
        return {"FlexAttention|": "needs a GPU"}
    if work.bench.options.quick:
        return {"FlexAttention|": "left out (--quick)"}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    offset = work.n - work.tokens
    mask = None
    if work.tokens > 1:
        mask = create_block_mask(
            lambda b, h, query, key: query + offset >= key, None, None, work.tokens, work.n, device=work.bench.device
        )

    def run(c: int) -> Tensor:
        k, v = work.dense(c)
        return compiled(work.q[c], k, v, block_mask=mask, scale=work.scale, enable_gqa=True).transpose(1, 2)

    return {"FlexAttention|": work.checked(run, lambda: work.dense(0))}


def flashinfer_ways(work: Work) -> dict[str, Run]:
    flashinfer = module("flashinfer")
    if flashinfer is None or work.bench.kind != "cuda":
        return {"FlashInfer|": NOT_INSTALLED if flashinfer is None else "needs a GPU"}
    rows, width, device = work.rows, work.width, work.bench.device
    indices = torch.randperm(rows * width, device=device).int()  # its pages in random order too
    indptr = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
    last = torch.full((rows,), work.page_size, dtype=torch.int32, device=device)
    kinds = {"q_data_type": work.dtype, "kv_data_type": work.dtype, "sm_scale": work.scale}
    shape = (work.query_heads, work.heads, work.dim, work.page_size)

    def plan(way: str) -> Callable[[int], Tensor]:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        if work.tokens == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=way == "tensor cores"
            )
            wrapper.plan(indptr, indices, last, *shape, **kinds)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            queries = torch.arange(rows + 1, dtype=torch.int32, device=device) * work.tokens
            wrapper.plan(queries, indptr, indices, last, *shape, causal=True, **kinds)
        flat = [q.transpose(1, 2).reshape(-1, work.query_heads, work.dim) for q in work.q]
        return lambda c: wrapper.run(flat[c], work.by_page(c))

    def logical() -> tuple[Tensor, Tensor]:
        both = []
        for x in work.by_page(0):
            ordered = x[indices.long()].view(rows, width, work.heads, work.page_size, work.dim)
            both.append(ordered.transpose(1, 2).reshape(rows, work.heads, work.n, work.dim))
        return both[0], both[1]

    runs: dict[str, Run] = {}
    for way in ("tensor cores", "CUDA cores") if work.tokens == 1 else ("paged",):
        try:
            runs[f"FlashInfer|{way}"] = work.checked(plan(way), logical)
        except Exception as error:
            runs[f"FlashInfer|{way}"] = f"failed: {type(error).__name__}"
    return runs


def flash_attention_ways(work: Work) -> dict[str, Run]:
    """Version 3 where it is installed, with pages and without; else version 2 on contiguous keys and values."""
    flash = module("flash_attn_interface", "flash_attn")
    if flash is None or work.bench.kind != "cuda":
        return {"FlashAttention|": NOT_INSTALLED if flash is None else "needs a GPU"}
    rows, device = work.rows, work.bench.device
    third = flash.__name__ == "flash_attn_interface"
    lengths = torch.full((rows,), work.n, dtype=torch.int32, device=device)
    order = torch.randperm(rows * work.width, device=device).int().view(rows, work.width)
    flat = [q.transpose(1, 2).contiguous() for q in work.q]
    shared = {"cache_seqlens": lengths, "softmax_scale": work.scale, "causal": True}

    def only(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def dense(c: int) -> Tensor:
        return only(flash.flash_attn_with_kvcache(flat[c], *work.by_token(c), **shared))

    def paged(c: int) -> Tensor:
        return only(flash.flash_attn_with_kvcache(flat[c], *work.by_paged_token(c), page_table=order, **shared))

    def dense_logical() -> tuple[Tensor, Tensor]:
        k, v = work.by_token(0)
        return k.transpose(1, 2), v.transpose(1, 2)

    def paged_logical() -> tuple[Tensor, Tensor]:
        k, v = (x[order.long()].flatten(1, 2).transpose(1, 2) for x in work.by_paged_token(0))
        return k, v

    runs = {f"FlashAttention|{3 if third else 2} contiguous": work.checked(dense, dense_logical)}
    if third:
        runs["FlashAttention|3 paged"] = work.checked(paged, paged_logical)
    return runs


FAMILIES = (
    (sdpa_ways, ("SDPA flash", "SDPA cuDNN")),
    (flex_ways, ("FlexAttention",)),
    (flashinfer_ways, ("FlashInfer",)),
    (flash_attention_ways, ("FlashAttention",)),
)
