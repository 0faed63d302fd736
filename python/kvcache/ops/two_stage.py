"""Selection in two stages: page bounds, a shortlist of pages, the exact vote inside it. Built of the ops alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcache import ops

__all__ = ["best_pages", "selection_recall", "two_stage_selection"]


def two_stage_selection(
    q: Tensor,
    k_pages: Tensor,
    bounds: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    k: int | Tensor,
    shortlist_pages: int,
    *,
    soft: bool = True,
    per_head: bool = False,
    width: int | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Which entries a decode step reads: the protected ones and about the ``k`` best candidates.

    1. every page votes with an upper bound of its keys' logits (Quest, arXiv 2406.10774): ``bounds`` [P, 2, Dk], kept
       by the ops that write pages (:func:`kvcache.ops.append`, ...); reads 2 / S of what the keys take;
    2. the ``shortlist_pages`` best pages are kept, lowest column first among equals; pages that hold a protected entry
       (``position < first[r]`` or ``position >= end[r]``) come before all others and count as well, so there must be
       more of them on the list than ``first`` and ``end`` protect;
    3. the entries of those pages vote exactly (TokenSelect, arXiv 2411.02886, Eq. 7): the softmax runs over the
       shortlist instead of over all candidates;
    4. the ``k`` best of them and the protected entries of those pages are the selection.

    With a shortlist of all pages this is the exact selection. Otherwise it may miss entries, as a bound does not say
    how the keys inside a page rank: :func:`selection_recall` measures how many.

    Shapes and the other arguments: :func:`kvcache.ops.reference.selection_scores`. ``k`` is an int or [R, L] int32,
    with L = H if ``per_head`` else 1. Returns ``index`` [R, L, width] int32, slots ascending, padded with -1, and
    ``index_counts`` [R, L] int32, which :func:`kvcache.ops.decode_attention` reads; ``width`` is by default what
    always suffices, ``min(shortlist_pages, M) * S``. ``total``: what makes the votes of these heads those of all (a sum
    over tensor-parallel ranks). Nothing here waits for a GPU.
    """
    if shortlist_pages < 1:
        raise ValueError(f"two_stage_selection: shortlist_pages is {shortlist_pages}, needs 1 or more")
    rows, heads, columns = table.shape
    page_size, lists = k_pages.shape[1], heads if per_head else 1
    counts_of, positions_of = counts[:, :lists], positions[:, :lists]
    shortlist = min(shortlist_pages, columns)
    keys = (table, counts, positions, first, end, scale, soft, per_head)

    bound = ops.page_scores(q, bounds, *keys)
    bound = bound if total is None else total(bound)
    pages, page_counts = best_pages(bound, counts_of, page_size, shortlist)
    scores = ops.selection_scores(q, k_pages, *keys, pages, page_counts)
    scores = scores if total is None else total(scores)
    best = k if isinstance(k, Tensor) else torch.full((rows, lists), k, dtype=torch.int32, device=q.device)
    places = shortlist * page_size if width is None else width
    return ops.topk(scores, counts_of, positions_of, best, first, end, places, pages, page_counts, page_size)


def best_pages(scores: Tensor, counts: Tensor, page_size: int, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` pages of the highest score among those that hold entries, the lowest column first among equals.

    ``scores`` [R, L, M] float32, ``counts`` [R, L] int32: entries of each head. Returns ``index`` [R, L, most] int32,
    columns ascending, padded with -1, and ``index_counts`` [R, L] int32.
    """
    rows, lists, columns = scores.shape
    # A page is to topk an entry whose position is its column, and all are candidates.
    numbers = torch.arange(columns + 1, dtype=torch.int32, device=scores.device)
    return ops.topk(
        scores,
        (counts + (page_size - 1)).div(page_size, rounding_mode="floor"),
        numbers[:columns].expand(rows, lists, columns),
        numbers[most : most + 1].expand(rows, lists),
        numbers[:1].repeat(rows),
        numbers[columns:].repeat(rows),
        most,
    )


def selection_recall(
    index: Tensor,
    counts: Tensor,
    exact_index: Tensor,
    exact_counts: Tensor,
    positions: Tensor | None = None,
    first: Tensor | None = None,
    end: Tensor | None = None,
) -> Tensor:
    """Share [R, L] float32 of the exact selection that another one found; 1 where there was nothing to find.

    ``index`` [R, L, K] int32 lists slots in ascending order, ``counts`` [R, L] int32 of them, as ``exact_index``
    [R, L, K'] and ``exact_counts`` do. Protected entries are in both and would flatter the result: with ``positions``
    [R, H >= L, C] and the ``first`` and ``end`` [R] of the selection only its candidates are counted.
    """
    absent = torch.iinfo(torch.int32).max
    places = torch.arange(index.shape[2], device=index.device)
    found = index.masked_fill(places >= counts[..., None], absent)
    found = torch.nn.functional.pad(found, (0, 1), value=absent)
    wanted = torch.arange(exact_index.shape[2], device=index.device) < exact_counts[..., None]
    if positions is not None and first is not None and end is not None and positions.shape[2]:
        p = positions[:, : exact_index.shape[1]].gather(2, exact_index.clamp(min=0).long())
        wanted = wanted & (p >= first[:, None, None]) & (p < end[:, None, None])
    place = torch.searchsorted(found, exact_index.contiguous())
    hit = wanted & (found.gather(2, place.clamp(max=index.shape[2])) == exact_index)
    total = wanted.sum(2)
    return torch.where(total > 0, hit.sum(2) / total.clamp(min=1), 1.0).float()
