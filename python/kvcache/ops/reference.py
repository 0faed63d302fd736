"""Plain-torch reference of every op: the oracle that the native kernels are tested against.

Written to be read, not to be fast. Runs on any device; arithmetic is float32 (float64 if an input is float64).

Shapes used by all ops (R rows, H kv heads, G query heads per kv head, Hq = H * G, T new tokens, S page size,
M table width, C = M * S column capacity, N side columns, P pages of the pool):

========== ======================= ==========================================================================
k_pages    [P, S, Dk]              keys of all pages; float32, bfloat16 or float16
v_pages    [P, S, Dv]              values, same dtype as the keys; Dv may differ from Dk
table      [R, H, M] int32         page ids; entry ``slot // S`` holds ``slot``; unused entries are -1
counts     [R, H] int32            entries held by a head; slots ``0 .. count-1`` are alive, in any order
positions  [R, H, C] int32         position of each entry among the real (not padding) tokens of its row
columns    [N, R, H, C] float32    side columns; column 0 is the score
bounds     [P, 2, Dk]              smallest and largest key of each page, per channel, in the pages' dtype
========== ======================= ==========================================================================

Slots at or beyond ``count`` hold garbage, also NaN: no op lets it through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEG_INF = float("-inf")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _alive(counts: Tensor, width: int) -> Tensor:
    """bool [R, H, width]: which slots hold an entry."""
    return torch.arange(width, device=counts.device) < counts[..., None]


def gather_pages(pages: Tensor, table: Tensor, counts: Tensor, width: int | None = None) -> Tensor:
    """Dense copy of the entries in slot order, [R, H, width, D] in the pages' dtype; dead slots are zero."""
    rows, heads, table_width = table.shape
    width = table_width * pages.shape[1] if width is None else width
    used = -(-width // pages.shape[1])
    dense = pages[table[..., :used].clamp(min=0).long()].flatten(2, 3)[:, :, :width]
    return dense.masked_fill(~_alive(counts, width)[..., None], 0)


def append(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    k: Tensor,
    v: Tensor,
    new_positions: Tensor,
    new_columns: Tensor | None = None,
    bounds: Tensor | None = None,
) -> None:
    """Write ``k`` [R, H, T, Dk] and ``v`` [R, H, T, Dv] behind the entries of each head, in place.

    ``new_positions`` [R, T] int32; negative marks a token that is not stored (padding, or a layer that this token
    skips). ``new_columns`` [N, R, H, T] float32 fills the side columns, zeros when None. Adds to ``counts``.
    ``bounds`` are kept up to date: those of a page whose first slot is written start afresh, others widen; NaN keys
    leave them alone (a page and channel of nothing but NaN has the bounds inf and -inf). :func:`overwrite`,
    :func:`compact` and :func:`copy_pages` keep them up to date as well where they are given them.
    """
    page_size = k_pages.shape[1]
    for r in range(table.shape[0]):
        keep = (new_positions[r] >= 0).nonzero().squeeze(-1)
        for h in range(table.shape[1]):
            slots = int(counts[r, h]) + torch.arange(len(keep), device=keep.device)
            pages = table[r, h, slots // page_size].long()
            k_pages[pages, slots % page_size] = k[r, h, keep].to(k_pages.dtype)
            v_pages[pages, slots % page_size] = v[r, h, keep].to(v_pages.dtype)
            positions[r, h, slots] = new_positions[r, keep]
            columns[:, r, h, slots] = 0.0 if new_columns is None else new_columns[:, r, h, keep]
            if bounds is not None:
                for column in (slots // page_size).unique().tolist():
                    new = slots[slots // page_size == column] % page_size
                    page = int(table[r, h, column])
                    _widen(bounds[page], k_pages[page, new], fresh=int(new[0]) == 0)
        counts[r] += len(keep)


def _widen(bounds: Tensor, keys: Tensor, fresh: bool) -> None:
    """Make ``bounds`` [2, Dk] of a page include ``keys`` [n, Dk]; fresh: nothing else."""
    missing = keys.isnan()
    low = keys.masked_fill(missing, float("inf")).amin(0)
    high = keys.masked_fill(missing, NEG_INF).amax(0)
    bounds[0] = low if fresh else torch.fmin(bounds[0], low)
    bounds[1] = high if fresh else torch.fmax(bounds[1], high)


def page_bounds(k_pages: Tensor, table: Tensor, counts: Tensor, bounds: Tensor) -> None:
    """Recompute ``bounds`` of every page that holds an entry, from the keys of its live slots.

    For when bounds are first wanted, or entries were moved without them. A page that several heads share holds the
    same live slots in each.
    """
    page_size = k_pages.shape[1]
    for r in range(table.shape[0]):
        for h in range(table.shape[1]):
            for column, begin in enumerate(range(0, int(counts[r, h]), page_size)):
                page = int(table[r, h, column])
                _widen(bounds[page], k_pages[page, : int(counts[r, h]) - begin], fresh=True)


def copy_pages(k_pages: Tensor, v_pages: Tensor, source: Tensor, target: Tensor, bounds: Tensor | None = None) -> None:
    """Copy whole pages ``source`` [n] int32 onto ``target`` [n] int32 (copy on write), with their ``bounds`` if given;
    no target is a source."""
    for pages in (k_pages, v_pages) if bounds is None else (k_pages, v_pages, bounds):
        pages[target.long()] = pages[source.long()]


def compact(
    k_pages: Tensor,
    v_pages: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    keep: Tensor,
    keep_counts: Tensor,
    bounds: Tensor | None = None,
) -> None:
    """Keep only the slots ``keep`` [R, H, K] int32 (ascending; the first ``keep_counts`` [R, H] count) of each head.

    Entry ``keep[r, h, i]`` moves to slot i of the pages in ``target_table``, which may be ``source_table`` itself
    (in place) or fresh pages (the source is shared). Sets ``counts`` to ``keep_counts``. ``bounds``, if given, are
    recomputed for every page of ``target_table`` that holds an entry.
    """
    page_size = k_pages.shape[1]
    for r in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            n = int(keep_counts[r, h])
            old = keep[r, h, :n].long()
            new = torch.arange(n, device=old.device)
            source, target = source_table[r, h].long(), target_table[r, h].long()
            for pages in (k_pages, v_pages):
                moved = pages[source[old // page_size], old % page_size]
                pages[target[new // page_size], new % page_size] = moved
            positions[r, h, :n] = positions[r, h, old]
            columns[:, r, h, :n] = columns[:, r, h, old]
    counts.copy_(keep_counts)
    if bounds is not None:
        page_bounds(k_pages, target_table, counts, bounds)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Logits [R, H, G, T, n] of q [R, Hq, T, D] over dense keys k [R, H, n, D]."""
    rows, heads, _, dim = k.shape
    wide = _wide(q.dtype)
    group = q.shape[1] // heads if heads else 0
    logits = q.to(wide).view(rows, heads, group, q.shape[2], dim) @ k.to(wide)[:, :, None].transpose(-1, -2) * scale
    return torch.tanh(logits / softcap) * softcap if softcap > 0 else logits


def _per_group(x: Tensor, rows: int, heads: int, group: int) -> Tensor:
    """[R, 1 | H | Hq, ...] seen as [R, H, G, ...]."""
    if x.shape[1] == heads * group:
        return x.reshape(rows, heads, group, *x.shape[2:])
    return x[:, :, None].expand(rows, heads, group, *x.shape[2:])


def _visible(
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    window_start: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    index_counts: Tensor | None,
    width: int,
) -> Tensor:
    """bool [R, H, T, width]: which entries each query reads."""
    rows, heads = counts.shape
    p = positions[:, :, None, :width]
    seen = _alive(counts, width)[:, :, None] & (p <= q_positions[:, None, :, None])
    if window_start is not None:
        seen = seen & (p >= window_start[:, None, :, None])
    if mask is not None:
        seen = seen & mask[..., :width]
    if index is not None:
        assert index_counts is not None
        listed = torch.zeros(rows, index.shape[1], width + 1, dtype=torch.bool, device=counts.device)
        valid = (torch.arange(index.shape[2], device=index.device) < index_counts[..., None]) & (index < width)
        listed.scatter_(2, torch.where(valid, index, width).long(), True)
        seen = seen & listed[:, :, None, :width]
    return seen


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    index_counts: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries per row over the pages, which already hold the new tokens themselves.

    q [R, Hq, T, Dk]; query t of row r reads entries with ``window_start[r, t] <= position <= q_positions[r, t]``
    (both [R, T] int32). ``q_positions`` of -1 is a padding query: output 0, log-sum-exp -inf; so is any query that
    reads nothing. ``sinks`` [Hq] float32: one extra logit per head in the softmax's denominator. ``bias``
    [R, 1 | H | Hq, C] float32 is added to the logits, after the softcap. ``mask`` [R, 1 | H, T, C] bool hides entries.
    ``index`` [R, 1 | H, K] int32 with ``index_counts`` [R, 1 | H] restricts the reading to the listed slots.

    Returns ``out`` [R, T, Hq, Dv] in q's dtype and ``lse`` [R, Hq, T] float32 (sinks included).
    """
    rows, query_heads, tokens, _ = q.shape
    heads = counts.shape[1]
    width = int(counts.max()) if counts.numel() else 0
    k, v = (gather_pages(x, table, counts, width) for x in (k_pages, v_pages))
    logits = _scores(q, k, scale, softcap)
    if bias is not None:
        logits = logits + _per_group(bias, rows, heads, query_heads // heads)[..., None, :width]
    seen = _visible(counts, positions, q_positions, window_start, mask, index, index_counts, width)[:, :, None]
    logits = logits.masked_fill(~seen, NEG_INF)
    if sinks is not None:
        extra = sinks.to(logits.dtype).view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        # A query that reads nothing has no output, with or without a sink.
        extra = extra.masked_fill(~seen.any(-1, keepdim=True), NEG_INF)
        logits = torch.cat([logits, extra], -1)
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], NEG_INF)
    weights = torch.exp(logits[..., :width] - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])
    out = (weights @ v.to(weights.dtype)[:, :, None]).reshape(rows, query_heads, tokens, -1)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.reshape(rows, query_heads, tokens).float()


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    index_counts: Tensor | None,
    statistics: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    statistics_decay: float = 1.0,
    statistics_max: bool = False,
    index_pages: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over its ragged entries.

    q [R, Hq, Dk]; ``window_start`` [R] int32 hides entries below that position; the other arguments are those of
    :func:`prefill_attention`, but with ``index_pages`` the ``index`` lists columns of the table and every live entry
    of those pages is read. ``statistics`` [R, H, C] float32 is updated in place for every live entry:
    ``statistics = statistics * statistics_decay + p`` where p is the attention probability reduced over the group
    (mean, or max when ``statistics_max``); entries that are not read have p = 0. ``plan`` is a line of
    :func:`plan_decode`'s result, for these or for other counts.

    Returns ``out`` [R, Hq, Dv] in q's dtype and ``lse`` [R, Hq] float32 (sinks included).
    """
    rows, query_heads, _ = q.shape
    heads = counts.shape[1]
    if index_pages and index is not None and index_counts is not None:
        size = k_pages.shape[1]
        index = (index[..., None] * size + torch.arange(size, dtype=torch.int32, device=index.device)).flatten(2)
        index_counts = index_counts * size
    last = torch.full((rows, 1), torch.iinfo(torch.int32).max, dtype=torch.int32, device=q.device)
    start = None if window_start is None else window_start[:, None]
    out, lse = prefill_attention(
        q[:, :, None], k_pages, v_pages, table, counts, positions, last, start, sinks, bias, None, index, index_counts,
        scale, softcap,
    )  # fmt: skip
    if statistics is not None:
        width = int(counts.max()) if counts.numel() else 0
        logits = _scores(q[:, :, None], gather_pages(k_pages, table, counts, width), scale, softcap)
        if bias is not None:
            logits = logits + _per_group(bias, rows, heads, query_heads // heads)[..., None, :width]
        seen = _visible(counts, positions, last, start, None, index, index_counts, width)[:, :, None]
        level = lse.view(rows, heads, -1, 1, 1)
        p = torch.exp(logits - level.masked_fill(level == NEG_INF, 0.0)).masked_fill(~seen, 0.0)[..., 0, :]
        p = p.amax(2) if statistics_max else p.mean(2)
        old = statistics[..., :width]
        statistics[..., :width] = torch.where(_alive(counts, width), old * statistics_decay + p.float(), old)
    return out[:, 0], lse[..., 0]


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor | None,
    window_start: Tensor | None,
    statistics: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    statistics_decay: float = 1.0,
    statistics_max: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in the latent space of MLA: all query heads over one latent per entry, which is key and value at once.

    An entry is its latent, ``k_pages`` [P, S, L] with L up to 512, and its rotary key, ``v_pages`` [P, S, Dr] with Dr
    up to 128, of one head: ``table`` [R, 1, M]. The queries have been multiplied by the part of the up-projection that
    makes keys: q_latent [R, Hq, T, L]; q_rope [R, Hq, T, Dr] is their rotary part, of the same dtype. A logit is
    ``(q_latent . latent + q_rope . rope) * scale``. ``q_positions`` and ``window_start`` [R, T] int32 as in
    :func:`prefill_attention`; without ``q_positions`` every entry is in the past. ``statistics`` [R, 1, C], its decay
    and ``statistics_max`` as in :func:`decode_attention`, for T = 1 only, and so is ``plan``.

    Returns ``out`` [R, T, Hq, L] in the queries' dtype, weighted latents that the other part of the up-projection turns
    into values, and ``lse`` [R, T, Hq] float32. Source: the absorbed form in DeepSeek-V2, arXiv 2405.04434, section
    2.1.2. ValueError for sizes beyond the limits or that do not fit, TypeError for dtypes.
    """
    rows, query_heads, tokens, latent = q_latent.shape
    if q_positions is None:
        q_positions = torch.full((rows, tokens), torch.iinfo(torch.int32).max, dtype=torch.int32, device=counts.device)
    width = int(counts.max()) if counts.numel() else 0
    latents, ropes = (gather_pages(x, table, counts, width) for x in (k_pages, v_pages))
    q, keys = torch.cat([q_latent, q_rope], -1), torch.cat([latents, ropes], -1)
    seen = _visible(counts, positions, q_positions, window_start, None, None, None, width)  # [R, 1, T, n]
    logits = _scores(q, keys, scale, softcap)[:, 0].masked_fill(~seen, NEG_INF)  # [R, Hq, T, n]
    lse = logits.logsumexp(-1) if width else logits.new_full(logits.shape[:-1], NEG_INF)
    p = torch.exp(logits - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])
    out = p @ latents.to(p.dtype)
    if statistics is not None:
        old, mass = statistics[..., :width], p[:, :, 0]
        mass = mass.amax(1, keepdim=True) if statistics_max else mass.mean(1, keepdim=True)
        statistics[..., :width] = torch.where(_alive(counts, width), old * statistics_decay + mass.float(), old)
    return out.transpose(1, 2).to(q_latent.dtype).contiguous(), lse.transpose(1, 2).float().contiguous()


def plan_decode(counts: Tensor, added: int, most: int, workers: int = 0) -> Tensor:
    """How decode attention on a GPU shares out the entries of all layers among its blocks, once per step.

    counts [L, R, H] int32; every head gains ``added`` entries before the plan is used and holds at most ``most`` then;
    ``workers`` blocks, 0: as many as fit the device. Returns int32 [L, size], one line for each layer, of which only
    decode_attention knows the meaning (csrc/core/decode_plan.h). A plan decides who does what, never what comes out:
    the reference makes empty ones.
    """
    return counts.new_zeros(counts.shape[0], 0)


def column_sums(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    lse: Tensor,
    window_start: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    last: int = 0,
    reduce_max: bool = False,
) -> Tensor:
    """Attention mass that each entry received from the queries, given the log-sum-exp of :func:`prefill_attention`.

    Reduces ``exp(logit - lse)`` over the query heads of the group (mean, or max when ``reduce_max``) and sums it over
    the queries of a row: all real ones, or only the ``last`` ones when positive. The memory needed is linear
    in the length. Source: the accumulated attention score of H2O (arXiv 2306.14048, Algorithm 1) and the observation
    window of SnapKV. Returns [R, H, C] float32, zero for dead slots.
    """
    rows, query_heads, _, _ = q.shape
    heads, capacity = counts.shape[1], positions.shape[2]
    width = int(counts.max()) if counts.numel() else 0
    logits = _scores(q, gather_pages(k_pages, table, counts, width), scale, softcap)
    if bias is not None:
        logits = logits + _per_group(bias, rows, heads, query_heads // heads)[..., None, :width]
    seen = _visible(counts, positions, q_positions, window_start, mask, None, None, width)
    if last > 0:
        later = (q_positions >= 0).int().flip(1).cumsum(1).flip(1)
        seen = seen & ((q_positions >= 0) & (later <= last))[:, None, :, None]
    level = lse.view(rows, heads, -1, lse.shape[2], 1)
    p = torch.exp(logits - level.masked_fill(level == NEG_INF, 0.0)).masked_fill(~seen[:, :, None], 0.0)
    out = torch.zeros(rows, heads, capacity, device=q.device)
    out[..., :width] = p.amax(2).sum(2) if reduce_max else p.mean(2).sum(2)
    return out


def _vote(logits: Tensor, candidate: Tensor, soft: bool, per_head: bool) -> Tensor:
    """The heads' vote [R, H if per_head else 1, n] float32 over logits [R, H, G, n]; -inf for what is no candidate."""
    logits = logits.masked_fill(~candidate[:, :, None], NEG_INF)
    if soft and logits.shape[-1]:
        top = logits.amax(-1, keepdim=True)
        logits = torch.exp(logits - top.masked_fill(top == NEG_INF, 0.0))
        logits = logits / logits.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
    vote = logits.sum(2) if per_head else logits.sum((1, 2))[:, None]
    return vote.float().masked_fill(~(candidate if per_head else candidate[:, :1]), NEG_INF)


def selection_scores(
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
    """Score of each candidate entry (``first[r] <= position < end[r]``, [R] int32) for a query q [R, Hq, Dk].

    ``soft``: every query head takes the softmax of its logits ``q.k * scale`` over the candidates and the heads'
    probabilities are summed (TokenSelect's soft vote, arXiv 2411.02886, Eq. 7); otherwise the raw logits are summed
    (Eq. 5). ``per_head`` sums within each kv head's group only; without it all kv heads must hold the same entries in
    the same slots. Returns [R, H if per_head else 1, C] float32; -inf for entries that are no candidates.

    ``pages`` [R, H if per_head else 1, W] int32, of which the first ``page_counts`` [R, H if per_head else 1] count,
    lists ascending columns of the table: only the entries of those pages are candidates then, and the result is
    [R, H if per_head else 1, W * S] in the order of the list: place i is slot ``pages[i // S] * S + i % S``.
    """
    rows, heads, capacity = positions.shape
    dim, page_size = k_pages.shape[2], k_pages.shape[1]
    if pages is None:
        width = places = int(counts.max()) if counts.numel() else 0
        k, alive, p = gather_pages(k_pages, table, counts, width), _alive(counts, width), positions[..., :width]
    else:
        assert page_counts is not None
        width = pages.shape[2] * page_size
        places = width if capacity else 0
        listed = _alive(page_counts, pages.shape[2])[..., : places // page_size]
        columns = pages[..., : places // page_size].masked_fill(~listed, 0).expand(rows, heads, -1).long()
        inside = torch.arange(page_size, device=q.device)
        slots = (columns[..., None] * page_size + inside).flatten(2)
        alive = listed.repeat_interleave(page_size, 2) & (slots < counts[..., None])
        k = k_pages[table.gather(2, columns).clamp(min=0).long()].reshape(rows, heads, places, dim)
        k, p = k.masked_fill(~alive[..., None], 0), positions.gather(2, slots)
    logits = _scores(q[:, :, None], k, scale, 0.0)[..., 0, :]
    candidate = alive & (p >= first[:, None, None]) & (p < end[:, None, None])
    out = torch.full((rows, heads if per_head else 1, capacity if pages is None else width), NEG_INF, device=q.device)
    out[..., :places] = _vote(logits, candidate, soft, per_head)
    return out


def page_scores(
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
    """Score of each page for a query q [R, Hq, Dk], from ``bounds`` [P, 2, Dk]: the smallest and the largest key of the
    page in each channel, finite, in the pages' dtype. The page size is C / M.

    No key of a page has a larger logit than ``sum_d max(q_d * min_d, q_d * max_d) * scale`` (Quest, arXiv 2406.10774,
    Algorithm 1). These bounds vote as the logits do in :func:`selection_scores`; every page with a live entry takes
    part. A page that holds an entry with ``position < first[r]`` or ``position >= end[r]`` ([R] int32) scores +inf, as
    it must be on the shortlist, one without live entries -inf. Returns [R, H if per_head else 1, M] float32.
    """
    rows, heads, width = table.shape
    page_size = positions.shape[2] // width if width else 1
    used = _alive((counts + page_size - 1).div(page_size, rounding_mode="floor"), width)
    wide = _wide(q.dtype)
    low, high = bounds[table.clamp(min=0).long()].masked_fill(~used[..., None, None], 0).to(wide).unbind(3)
    grouped = q.to(wide).view(rows, heads, q.shape[1] // heads if heads else 0, 1, q.shape[2])
    logits = torch.maximum(grouped * low[:, :, None], grouped * high[:, :, None]).sum(-1) * scale
    scores = _vote(logits, used, soft, per_head)
    guarded = (positions < first[:, None, None]) | (positions >= end[:, None, None])
    guarded = (guarded & _alive(counts, positions.shape[2])).view(rows, heads, width, page_size).any(-1)
    return scores.masked_fill(guarded if per_head else guarded[:, :1], float("inf"))


def query_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [R] float32 of ``a`` and ``b`` [R, Hq, D] over all heads of a row at once: what
    ``torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-8)`` says of them in float32.

    The test of TokenSelect's Selection Cache (arXiv 2411.02886, Algorithm 1).
    """
    return torch.cosine_similarity(a.flatten(1).float(), b.flatten(1).float(), dim=1, eps=1e-8)


def topk(
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
    """Slots to keep or read: every protected entry and the ``k`` best candidates of each head.

    scores, positions [R, H, C]; counts, k [R, H] int32; first, end [R] int32. Entries with ``position < first`` or
    ``position >= end`` are protected; of the rest the ``k`` with the highest score are taken (all of them when there
    are fewer), ties to the lowest position; NaN ranks lowest. Candidates scored -inf are taken last, not excluded.

    ``pages`` [R, H, W] int32, of which the first ``page_counts`` [R, H] count, lists ascending columns of the table:
    nothing but the entries of those pages exists then, and ``scores`` [R, H, W * page_size] are theirs, in the order
    of the list (score i is that of slot ``pages[i // page_size] * page_size + i % page_size``).

    Returns ``index`` [R, H, width] int32, slots ascending, padded with -1, and ``index_counts`` [R, H] int32. Raises
    ValueError when a head needs more than ``width`` slots. On a GPU nobody can raise: ``index_counts`` says how many
    slots such a head needs, and ``index`` holds the first ``width`` of them.
    """
    rows, heads = counts.shape
    index = torch.full((rows, heads, width), -1, dtype=torch.int32, device=scores.device)
    index_counts = torch.zeros(rows, heads, dtype=torch.int32, device=scores.device)
    for r in range(rows):
        for h in range(heads):
            n = int(counts[r, h])
            entries = torch.arange(n, device=scores.device)
            of_entry = scores[r, h, :n]
            if pages is not None:
                assert page_counts is not None
                listed = pages[r, h, : int(page_counts[r, h])].long()
                entries = (listed[:, None] * page_size + torch.arange(page_size, device=scores.device)).flatten()
                of_entry = scores[r, h, : len(entries)][entries < n]
                entries = entries[entries < n]
            p = positions[r, h, entries]
            protected = (p < first[r]) | (p >= end[r])
            candidates = (~protected).nonzero().squeeze(-1)
            candidates = candidates[p[candidates].argsort(stable=True)]
            values = of_entry[candidates].double().nan_to_num(nan=NEG_INF, posinf=float("inf"), neginf=NEG_INF)
            best = candidates[values.argsort(descending=True, stable=True)[: max(int(k[r, h]), 0)]]
            slots = entries[torch.cat([protected.nonzero().squeeze(-1), best]).sort().values]
            if len(slots) > width:
                raise ValueError(f"topk: width={width} is too small, head ({r}, {h}) keeps {len(slots)} entries")
            index[r, h, : len(slots)] = slots.int()
            index_counts[r, h] = len(slots)
    return index, index_counts


def select_tokens(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bounds: Tensor | None,
    query: Tensor,
    index: Tensor,
    index_counts: Tensor,
    until: Tensor,
    at: Tensor,
    events: Tensor,
    sinks: int,
    k: int,
    local: int,
    reuse: float,
    scale: float = 1.0,
    soft: bool = True,
    shortlist: int = 0,
) -> None:
    """A decode step of TokenSelect (arXiv 2411.02886) for queries q [R, Hq, Dk] at ``q_positions`` [R] int32 (-1: the
    row has none); each row's list of slots to read is brought up to date in place. All heads of a row hold the same
    entries, the step's own among them.

    State of each row, all written in place: ``index`` [R, 1, W] int32, of which the first ``index_counts`` [R, 1]
    int32 count: slots to read; ``query`` [R, Hq, Dk] in q's dtype: the query that chose them, without its rotation;
    ``at`` [R] int32: entries that the row held then, 0 for a row that never chose; ``until`` [R] int32: the list covers
    slots below. ``events`` [2] int32 counts selections and reuses.

    A row that holds more than ``sinks + k + local`` entries chooses anew if it never did, if the cosine of its query
    (all heads at once, turned back by ``cos``, ``sin`` [R, half] float32 in the first 2 * half channels, paired by
    halves) with the one that made its list is below ``reuse`` (the Selection Cache, Algorithm 1), if more than
    ``local`` entries came since (not with ``reuse <= -1``), or if those do not fit into ``index``. It takes the entries
    at positions below ``sinks`` or among the last ``local``, and the ``k`` best of the rest by the heads' vote
    (:func:`selection_scores` with ``soft`` and ``scale``, :func:`topk`); with ``bounds`` [P, 2, Dk] only those in the
    ``shortlist`` pages that :func:`page_scores` ranks first, as
    :func:`kvcache.ops.two_stage.two_stage_selection` chooses. Any other row goes on with its list and the entries that
    came since; a list of a row that holds no more than the sum thus stays all of them.
    """
    held = counts[:, 0] if counts.shape[1] else counts.new_zeros(len(counts))
    large = (q_positions >= 0) & (held > sinks + k + local)
    plain = q
    if cos is not None and sin is not None:
        half = cos.shape[1]
        a, b, c, s = q[..., :half].float(), q[..., half : 2 * half].float(), cos[:, None], sin[:, None]
        turned = [(a * c - b * s).to(q.dtype), (b * c + a * s).to(q.dtype), q[..., 2 * half :]]
        plain = torch.cat(turned, -1)
    anew = (at <= 0) | (query_similarity(plain, query) < reuse) | (index_counts[:, 0] + held - until > index.shape[2])
    if reuse > -1.0:
        anew = anew | (held - at > local)
    anew = anew & large
    events[0] += int(anew.sum())
    events[1] += int((large & ~anew).sum())
    for r in range(len(held)):
        n, grown = int(index_counts[r, 0]), int(held[r] - until[r])
        if anew[r]:
            row = slice(r, r + 1)
            keys = (k_pages, table[row], counts[row], positions[row])
            first = torch.full_like(held[row], sinks)
            end = (q_positions[row] + (1 - local)).clamp(min=sinks)
            best, width = torch.full_like(index_counts[row], k), index.shape[2]
            if bounds is None:
                scores = selection_scores(q[row], *keys, first, end, scale, soft)
                chosen = topk(scores, counts[row, :1], positions[row, :1], best, first, end, width)
            else:
                chosen = _of_shortlist(q[row], bounds, keys, first, end, scale, soft, best, shortlist, width)
            index[row], index_counts[row] = chosen
            query[r], at[r], until[r] = plain[r], held[r], held[r]
        else:
            grown = max(min(grown, index.shape[2] - n), -n)
            new = torch.arange(max(grown, 0), dtype=torch.int32, device=index.device)
            index[r, 0, n : n + len(new)] = new + until[r]
            index_counts[r, 0] += grown
            until[r] += grown


def _of_shortlist(
    q: Tensor,
    bounds: Tensor,
    keys: tuple[Tensor, Tensor, Tensor, Tensor],
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool,
    k: Tensor,
    shortlist: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Selection in two stages, of the rows of ``keys``: see :func:`kvcache.ops.two_stage.two_stage_selection`."""
    k_pages, table, counts, positions = keys
    page_size, columns = k_pages.shape[1], table.shape[2]
    listed = min(shortlist, columns)
    bound = page_scores(q, bounds, table, counts, positions, first, end, scale, soft)
    held = (counts[:, :1] + (page_size - 1)).div(page_size, rounding_mode="floor")
    numbers = torch.arange(columns, dtype=torch.int32, device=q.device).expand(len(q), 1, -1)
    least, all_ = torch.zeros_like(first), torch.full_like(first, columns)
    pages, page_counts = topk(bound, held, numbers, torch.full_like(held, listed), least, all_, listed)
    scores = selection_scores(q, *keys, first, end, scale, soft, False, pages, page_counts)
    return topk(scores, counts[:, :1], positions[:, :1], k, first, end, width, pages, page_counts, page_size)


def choose_victims(
    scores: Tensor | None,
    counts: Tensor,
    positions: Tensor,
    budgets: Tensor,
    first: Tensor,
    end: Tensor,
) -> Tensor:
    """The slot that each head over its budget gives up, [R, H] int32; -1 where ``counts <= budgets``.

    The victim is the candidate (``first[r] <= position < end[r]``) with the lowest score, among equals the one with
    the highest position, so that what stays is what :func:`topk` would keep; NaN ranks lowest. With ``scores`` None
    the victim is the candidate with the lowest position. A head without candidates keeps everything (-1).
    """
    rows, heads = counts.shape
    victims = torch.full((rows, heads), -1, dtype=torch.int32, device=counts.device)
    for r in range(rows):
        for h in range(heads):
            n = int(counts[r, h])
            p = positions[r, h, :n]
            candidates = ((p >= first[r]) & (p < end[r])).nonzero().squeeze(-1)
            if n <= int(budgets[r, h]) or len(candidates) == 0:
                continue
            candidates = candidates[p[candidates].argsort(descending=scores is not None, stable=True)]
            if scores is not None:
                values = scores[r, h, candidates].double().nan_to_num(nan=NEG_INF, posinf=float("inf"), neginf=NEG_INF)
                candidates = candidates[values.argsort(stable=True)]
            victims[r, h] = candidates[0]
    return victims


def overwrite(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    victims: Tensor,
    bounds: Tensor | None = None,
) -> None:
    """Evict slot ``victims`` [R, H] int32 of each head (-1: none) by moving the head's last entry there; O(1).

    ``bounds``, if given, are recomputed for the page of the victim and the page that the last entry leaves: they may
    have been the bounds of an entry that is gone. A page that is left without an entry keeps its own.
    """
    page_size = k_pages.shape[1]
    for r in range(table.shape[0]):
        for h in range(table.shape[1]):
            victim, last = int(victims[r, h]), int(counts[r, h]) - 1
            if victim < 0:
                continue
            source, target = table[r, h, last // page_size].long(), table[r, h, victim // page_size].long()
            for pages in (k_pages, v_pages):
                pages[target, victim % page_size] = pages[source, last % page_size]
            positions[r, h, victim] = positions[r, h, last]
            columns[:, r, h, victim] = columns[:, r, h, last]
            counts[r, h] -= 1
            if bounds is None:
                continue
            for page, column in ((target, victim // page_size), (source, last // page_size)):
                if last > column * page_size:
                    _widen(bounds[page], k_pages[page, : last - column * page_size], fresh=True)


def evict(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Sequence[Tensor],
    counts: Sequence[Tensor],
    positions: Sequence[Tensor],
    columns: Sequence[Tensor],
    scores: Sequence[Tensor | None],
    budgets: Sequence[Tensor],
    first: Sequence[Tensor],
    end: Sequence[Tensor],
    bounds: Tensor | None = None,
) -> None:
    """Evict at most one entry of every head of all layers: :func:`choose_victims` and :func:`overwrite` of each layer.

    One element per layer in every list, with that layer's H and M; R and N are those of all layers, and so are the
    pages. ``scores`` lists [R, H, C] float32 or, where the oldest entry leaves, None; an empty list is None for all.
    Strides of scores and budgets as for :func:`topk`. Scores may be views of the columns. The host learns nothing:
    on a GPU counts say afterwards who lost an entry.
    """
    for layer in range(len(table)):
        of_layer = scores[layer] if scores else None
        held = (counts[layer], positions[layer])
        victims = choose_victims(of_layer, *held, budgets[layer], first[layer], end[layer])
        overwrite(k_pages, v_pages, table[layer], *held, columns[layer], victims, bounds)


def active_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the true elements of ``mask`` [n] bool: ``index`` [n] int32, ascending, padded with -1, and ``count``
    [1] int32. The shapes do not depend on the mask, so that the rest of a step can be captured in a graph."""
    rows = mask.nonzero().squeeze(-1).int()
    index = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    index[: len(rows)] = rows
    return index, torch.tensor([len(rows)], dtype=torch.int32, device=mask.device)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [m] int32 of ``x`` [n, D], as [m, D]; -1 gives a row of zeros."""
    rows = x.new_zeros(index.shape[0], x.shape[1])
    listed = index >= 0
    rows[listed] = x[index[listed].long()]
    return rows


def scatter_rows(x: Tensor, rows: Tensor, index: Tensor) -> None:
    """Write ``rows`` [m, D] over the rows ``index`` [m] int32 of ``x`` [n, D]; -1: nowhere. No row is listed twice."""
    listed = index >= 0
    x[index[listed].long()] = rows[listed]
