"""What the ops return, without values: for torch.compile, FakeTensor and torch.library.opcheck."""

from __future__ import annotations

import torch
from torch import Tensor


def _nothing(*args: object, **kwargs: object) -> None:
    """Ops that only write into their arguments."""


def _prefill_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    rows, query_heads, tokens, _ = q.shape
    out = q.new_empty(rows, tokens, query_heads, v_pages.shape[2])
    return out, q.new_empty(rows, query_heads, tokens, dtype=torch.float32)


def _decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    rows, query_heads, _ = q.shape
    out = q.new_empty(rows, query_heads, v_pages.shape[2])
    return out, q.new_empty(rows, query_heads, dtype=torch.float32)


def _latent_attention(q_latent: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    rows, query_heads, tokens, latent = q_latent.shape
    out = q_latent.new_empty(rows, tokens, query_heads, latent)
    return out, q_latent.new_empty(rows, tokens, query_heads, dtype=torch.float32)


def _column_sums(
    q: Tensor, k_pages: Tensor, table: Tensor, counts: Tensor, positions: Tensor, *args: object, **kwargs: object
) -> Tensor:
    return q.new_empty(positions.shape, dtype=torch.float32)


def _selection_scores(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool = True,
    per_head: bool = False,
    pages: Tensor | None = None,
    page_counts: Tensor | None = None,
) -> Tensor:
    rows, heads, capacity = positions.shape
    places = capacity if pages is None else pages.shape[2] * k_pages.shape[1]
    return q.new_empty(rows, heads if per_head else 1, places, dtype=torch.float32)


def _page_scores(
    q: Tensor,
    bounds: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool = True,
    per_head: bool = False,
) -> Tensor:
    rows, heads, width = table.shape
    return q.new_empty(rows, heads if per_head else 1, width, dtype=torch.float32)


def _query_similarity(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], dtype=torch.float32)


def _topk(
    scores: Tensor,
    counts: Tensor,
    positions: Tensor,
    k: Tensor,
    first: Tensor,
    end: Tensor,
    width: int,
    pages: Tensor | None = None,
    page_counts: Tensor | None = None,
    page_size: int = 0,
) -> tuple[Tensor, Tensor]:
    rows, heads = counts.shape
    return counts.new_empty(rows, heads, width), counts.new_empty(rows, heads)


def _choose_victims(
    scores: Tensor | None, counts: Tensor, positions: Tensor, budgets: Tensor, first: Tensor, end: Tensor
) -> Tensor:
    return counts.new_empty(counts.shape)


def _active_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _plan_decode(counts: Tensor, added: int, most: int, workers: int = 0) -> Tensor:
    # What 0 stands for is known on the device only.
    size = 8 * (1 + workers) if workers else torch.library.get_ctx().new_dynamic_size()
    return counts.new_empty(counts.shape[0], size)


def register(namespace: str) -> None:
    """Register all of them for ``torch.ops.<namespace>``; once, after its ops."""
    for name, function in {
        "append": _nothing,
        "copy_pages": _nothing,
        "compact": _nothing,
        "overwrite": _nothing,
        "evict": _nothing,
        "prefill_attention": _prefill_attention,
        "decode_attention": _decode_attention,
        "latent_attention": _latent_attention,
        "plan_decode": _plan_decode,
        "column_sums": _column_sums,
        "selection_scores": _selection_scores,
        "page_scores": _page_scores,
        "query_similarity": _query_similarity,
        "select_tokens": _nothing,
        "topk": _topk,
        "choose_victims": _choose_victims,
        "page_bounds": _nothing,
        "active_rows": _active_rows,
        "gather_rows": _gather_rows,
        "scatter_rows": _nothing,
    }.items():
        torch.library.register_fake(f"{namespace}::{name}")(function)
