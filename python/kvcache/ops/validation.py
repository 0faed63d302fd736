"""The native ops' argument checks in Python, for the reference backend: same exceptions, same order, same words.

The native twin is csrc/bindings/torch_ops*.cpp; tests/ops/test_errors.py holds the two together. A wrong dtype is a
TypeError, everything else a ValueError; nothing has been written when one is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvcache.ops import reference

MAX_HEAD_SIZE = 256
MAX_LATENT, MAX_ROPE = 512, 128
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
Dims = list[tuple[str, int | None]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Checker:
    """The checks of one call; every tensor must be where the first one is."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.device: torch.device | None = None

    def value_error(self, message: str) -> ValueError:
        return ValueError(f"{self.op}: {message}")

    def dtype(self, name: str, tensor: Tensor, *wanted: torch.dtype) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} is {type(tensor).__name__}, needs a tensor")
        if tensor.dtype not in wanted:
            *most, last = (_name(dtype) for dtype in wanted)
            needed = f"{', '.join(most)} or {last}" if most else last
            raise TypeError(f"{self.op}: {name} is {_name(tensor.dtype)}, needs {needed}")

    def shape(self, name: str, tensor: Tensor, dims: Dims) -> None:
        if tensor.dim() != len(dims) or any(n not in (None, m) for m, (_, n) in zip(tensor.shape, dims)):
            needed = ", ".join(label if n is None else f"{label}={n}" for label, n in dims)
            raise self.value_error(f"{name} has shape {list(tensor.shape)}, needs [{needed}]")

    def place(self, name: str, tensor: Tensor) -> None:
        self.device = self.device or tensor.device
        if tensor.device != self.device:
            raise self.value_error(f"{name} is on {tensor.device}, the others are on {self.device}")

    def contiguous(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise self.value_error(
                f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}, needs to be contiguous"
            )

    def inner_contiguous(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise self.value_error(f"{name} has strides {list(tensor.stride())}, needs 1 in the last dimension")

    def plain(self, name: str, tensor: Tensor, dtype: torch.dtype, dims: Dims) -> None:
        self.dtype(name, tensor, dtype)
        self.shape(name, tensor, dims)
        self.contiguous(name, tensor)
        self.place(name, tensor)

    def strided(self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dims: Dims) -> None:
        self.dtype(name, tensor, *dtypes)
        self.shape(name, tensor, dims)
        if len(dims) > 2:
            self.inner_contiguous(name, tensor)
        self.place(name, tensor)


class _View(_Checker):
    """The checks of a call on one layer's pages; keeps the sizes that later arguments must agree with."""

    def page_arrays(self, k_pages: Tensor, v_pages: Tensor | None) -> None:
        self.dtype("k_pages", k_pages, *STORAGE)
        self.shape("k_pages", k_pages, [("P", None), ("S", None), ("Dk", None)])
        self.contiguous("k_pages", k_pages)
        self.place("k_pages", k_pages)
        self.pages, self.page_size, self.k_dim = k_pages.shape
        if self.page_size < 1:
            raise self.value_error("k_pages has a page size of 0")
        if v_pages is not None:
            self.dtype("v_pages", v_pages, *STORAGE)
            if v_pages.dtype != k_pages.dtype:
                kinds = f"{_name(v_pages.dtype)}, needs {_name(k_pages.dtype)}"
                raise TypeError(f"{self.op}: v_pages is {kinds} as k_pages has")
            self.shape("v_pages", v_pages, [("P", self.pages), ("S", self.page_size), ("Dv", None)])
            self.contiguous("v_pages", v_pages)
            self.place("v_pages", v_pages)
            self.v_dim = v_pages.shape[2]

    def head_sizes(self, k_pages: Tensor, v_pages: Tensor | None) -> None:
        """What the attention kernels can read. Storing has no limit: MLA caches latents wider than any head."""
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            if pages is not None and not 1 <= pages.shape[2] <= MAX_HEAD_SIZE:
                raise self.value_error(f"{name} has head size {pages.shape[2]}, needs 1 to {MAX_HEAD_SIZE}")

    def view(self, k_pages: Tensor, v_pages: Tensor | None, table: Tensor, name: str = "table") -> None:
        self.page_arrays(k_pages, v_pages)
        self.page_table(name, table, self.page_size)

    def page_table(self, name: str, table: Tensor, page_size: int) -> None:
        self.plain(name, table, torch.int32, [("R", None), ("H", None), ("M", None)])
        self.table, self.page_size = table, page_size
        self.rows, self.heads, width = table.shape
        self.capacity = width * page_size
        self.per_row: Dims = [("R", self.rows)]
        self.per_head: Dims = [*self.per_row, ("H", self.heads)]
        self.per_entry: Dims = [*self.per_head, ("C", self.capacity)]

    def entries(self, counts: Tensor, positions: Tensor) -> None:
        self.plain("counts", counts, torch.int32, self.per_head)
        self.plain("positions", positions, torch.int32, self.per_entry)
        self.counts_in_range(counts, self.capacity)
        self.counts = counts

    def counts_in_range(self, counts: Tensor, capacity: int) -> None:
        for r, h in ((counts < 0) | (counts > capacity)).nonzero().tolist():
            raise self.value_error(f"counts of head ({r}, {h}) is {int(counts[r, h])}, needs 0 to C={capacity}")

    def bounds(self, bounds: Tensor, dtype: torch.dtype) -> None:
        self.dtype("bounds", bounds, *STORAGE)
        if bounds.dtype != dtype:
            raise TypeError(f"{self.op}: bounds is {_name(bounds.dtype)}, needs the dtype of the pages")
        self.shape("bounds", bounds, [("P", self.pages), ("2", 2), ("Dk", self.k_dim)])
        self.contiguous("bounds", bounds)
        self.place("bounds", bounds)

    def columns(self, columns: Tensor) -> None:
        self.plain("columns", columns, torch.float32, [("N", None), *self.per_entry])

    def page_ids(self, name: str, table: Tensor, begin: Tensor, end: Tensor) -> None:
        """Pages that hold slots begin .. end - 1 [R, H] exist."""
        column = torch.arange(table.shape[2], device=table.device)
        first = begin[..., None].div(self.page_size, rounding_mode="floor")
        last = (end[..., None] - 1).div(self.page_size, rounding_mode="floor")
        touched = (begin < end)[..., None] & (column >= first) & (column <= last)
        for r, h, c in (touched & ((table < 0) | (table >= self.pages))).nonzero().tolist():
            page = int(table[r, h, c])
            raise self.value_error(
                f"{name} of head ({r}, {h}) holds page {page} in column {c}, needs 0 to P-1={self.pages - 1}"
            )

    def listed_pages(self, pages: Tensor, page_counts: Tensor, columns: int | Tensor) -> None:
        """``pages`` [R, H, W] lists ascending columns of a table, the first ``page_counts`` [R, H] of them count.

        ``columns``: how many there are, for all heads or [R, H].
        """
        width = pages.shape[2]
        for r in range(pages.shape[0]):
            for h in range(pages.shape[1]):
                n = int(page_counts[r, h])
                if not 0 <= n <= width:
                    raise self.value_error(f"page_counts of head ({r}, {h}) is {n}, needs 0 to W={width}")
                before, held = -1, int(columns[r, h]) if isinstance(columns, Tensor) else columns
                for page in pages[r, h, :n].tolist():
                    if not before < page < held:
                        raise self.value_error(
                            f"pages of head ({r}, {h}) lists {page}, needs ascending columns below {held}"
                        )
                    before = page

    def live_pages(self) -> None:
        self.page_ids("table", self.table, torch.zeros_like(self.counts), self.counts)

    def query(self, q: Tensor, tokens: bool) -> None:
        dims: Dims = [("R", self.rows), ("Hq", None), *([("T", None)] if tokens else []), ("Dk", self.k_dim)]
        self.strided("q", q, STORAGE, dims)
        self.query_heads = q.shape[1]
        self.tokens = q.shape[2] if tokens else 1
        if (self.query_heads % self.heads if self.heads else self.query_heads) != 0:
            raise self.value_error(f"q has {self.query_heads} heads, needs a multiple of H={self.heads}")

    def heads_of(self, name: str, tensor: Tensor, choices: list[int]) -> None:
        if tensor.dim() > 1 and tensor.shape[1] not in choices:
            wanted = " or ".join(map(str, choices))
            raise self.value_error(f"{name} has {tensor.shape[1]} heads in dimension 1, needs {wanted}")

    def bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            self.plain("bias", bias, torch.float32, [*self.per_row, ("heads", None), ("C", self.capacity)])
            self.heads_of("bias", bias, [1, self.heads, self.query_heads])

    def mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            dims: Dims = [*self.per_row, ("heads", None), ("T", self.tokens), ("C", self.capacity)]
            self.plain("mask", mask, torch.bool, dims)
            self.heads_of("mask", mask, [1, self.heads])

    def index(self, index: Tensor | None, index_counts: Tensor | None, pages: bool = False) -> None:
        if (index is None) != (index_counts is None):
            raise self.value_error("index and index_counts need each other")
        if index is None or index_counts is None:
            return
        self.plain("index", index, torch.int32, [*self.per_row, ("heads", None), ("K", None)])
        self.heads_of("index", index, [1, self.heads])
        self.plain("index_counts", index_counts, torch.int32, [*self.per_row, ("heads", index.shape[1])])
        width = index.shape[2]
        for r, h in ((index_counts < 0) | (index_counts > width)).nonzero().tolist():
            raise self.value_error(f"index_counts of ({r}, {h}) is {int(index_counts[r, h])}, needs 0 to K={width}")
        shared = index.shape[1] != self.heads
        room = (
            self.counts
            if not shared
            else self.counts.amax(1, keepdim=True)
            if self.heads
            else self.counts.new_zeros(self.rows, 1)
        )
        if pages:
            room = (room + self.page_size - 1) // self.page_size
        what = "page" if pages else "slot"
        for r in range(index.shape[0]):
            for h in range(index.shape[1]):
                slots = index[r, h, : int(index_counts[r, h])].tolist()
                for slot in slots:
                    if not 0 <= slot < int(room[r, h]):
                        raise self.value_error(
                            f"index of ({r}, {h}) lists {what} {slot}, needs a {what} below {int(room[r, h])}"
                        )
                slots.sort()
                for before, slot in pairwise(slots):
                    if before == slot:
                        raise self.value_error(f"index of ({r}, {h}) lists {what} {slot} twice")

    def attention(
        self,
        q_positions: Tensor | None,
        window_start: Tensor | None,
        sinks: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        softcap: float,
    ) -> None:
        per_token: Dims = self.per_row if q_positions is None else [*self.per_row, ("T", self.tokens)]
        if q_positions is not None:
            self.plain("q_positions", q_positions, torch.int32, per_token)
        if window_start is not None:
            self.plain("window_start", window_start, torch.int32, per_token)
        if sinks is not None:
            self.plain("sinks", sinks, torch.float32, [("Hq", self.query_heads)])
        self.bias(bias)
        self.mask(mask)
        if not softcap >= 0:
            raise self.value_error(f"softcap is {softcap:f}, needs 0 (none) or more")


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
    new_columns: Tensor | None,
    bounds: Tensor | None,
) -> None:
    check = _View("append")
    check.view(k_pages, v_pages, table)
    check.entries(counts, positions)
    check.columns(columns)
    check.strided("k", k, STORAGE, [*check.per_head, ("T", None), ("Dk", check.k_dim)])
    tokens = ("T", k.shape[2])
    check.strided("v", v, STORAGE, [*check.per_head, tokens, ("Dv", check.v_dim)])
    check.plain("new_positions", new_positions, torch.int32, [*check.per_row, tokens])
    if new_columns is not None:
        check.plain("new_columns", new_columns, torch.float32, [("N", columns.shape[0]), *check.per_head, tokens])
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
    after = counts + (new_positions >= 0).sum(1, keepdim=True)
    for r, h in (after > check.capacity).nonzero().tolist():
        raise check.value_error(
            f"counts of head ({r}, {h}) would be {int(after[r, h])}, the table holds C={check.capacity} entries"
        )
    check.page_ids("table", table, counts, after)


def copy_pages(k_pages: Tensor, v_pages: Tensor, source: Tensor, target: Tensor, bounds: Tensor | None) -> None:
    check = _View("copy_pages")
    check.plain("source", source, torch.int32, [("n", None)])
    check.plain("target", target, torch.int32, [("n", source.shape[0])])
    check.page_arrays(k_pages, v_pages)
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
    sources, targets = source.tolist(), target.tolist()
    for page in (page for pair in zip(sources, targets) for page in pair):
        if not 0 <= page < check.pages:
            raise check.value_error(f"source or target names page {page}, needs 0 to P-1={check.pages - 1}")
    for before, page in pairwise(sorted(targets)):
        if before == page:
            raise check.value_error(f"target names page {page} twice")
    for page in sources:
        if page in set(targets):
            raise check.value_error(f"page {page} is both source and target")


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
    bounds: Tensor | None,
) -> None:
    check = _View("compact")
    check.view(k_pages, v_pages, source_table, "source_table")
    check.entries(counts, positions)
    check.columns(columns)
    check.plain("target_table", target_table, torch.int32, [*check.per_head, ("M", None)])
    check.plain("keep", keep, torch.int32, [*check.per_head, ("K", None)])
    check.plain("keep_counts", keep_counts, torch.int32, check.per_head)
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
    room = min(keep.shape[2], target_table.shape[2] * check.page_size)
    for r in range(check.rows):
        for h in range(check.heads):
            n = int(keep_counts[r, h])
            if not 0 <= n <= room:
                raise check.value_error(f"keep_counts of head ({r}, {h}) is {n}, needs 0 to {room}")
            before, count = -1, int(counts[r, h])
            for slot in keep[r, h, :n].tolist():
                if not before < slot < count:
                    raise check.value_error(
                        f"keep of head ({r}, {h}) holds slot {slot} after {before}, needs ascending slots below {count}"
                    )
                page = int(source_table[r, h, slot // check.page_size])
                if not 0 <= page < check.pages:
                    raise check.value_error(
                        f"source_table of head ({r}, {h}) holds page {page} in column {slot // check.page_size}, "
                        f"needs 0 to P-1={check.pages - 1}"
                    )
                before = slot
    check.page_ids("target_table", target_table, torch.zeros_like(keep_counts), keep_counts)


def overwrite(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    victims: Tensor,
    bounds: Tensor | None,
) -> None:
    check = _View("overwrite")
    check.view(k_pages, v_pages, table)
    check.entries(counts, positions)
    check.columns(columns)
    check.plain("victims", victims, torch.int32, check.per_head)
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
    for r, h in (victims >= counts).logical_and(victims >= 0).nonzero().tolist():
        raise check.value_error(
            f"victims of head ({r}, {h}) is slot {int(victims[r, h])}, needs a slot below {int(counts[r, h])} or -1"
        )
    none = victims < 0
    check.page_ids("table", table, victims.masked_fill(none, 0), (victims + 1).masked_fill(none, 0))
    check.page_ids("table", table, (counts - 1).masked_fill(none, 0), counts.masked_fill(none, 0))


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
    softcap: float,
) -> None:
    check = _View("prefill_attention")
    check.view(k_pages, v_pages, table)
    check.head_sizes(k_pages, v_pages)
    check.entries(counts, positions)
    check.query(q, tokens=True)
    check.attention(q_positions, window_start, sinks, bias, mask, softcap)
    check.index(index, index_counts)
    check.live_pages()


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
    softcap: float,
    statistics_decay: float,
    statistics_max: bool,
    index_pages: bool,
    plan: Tensor | None,
) -> None:
    check = _View("decode_attention")
    check.view(k_pages, v_pages, table)
    check.head_sizes(k_pages, v_pages)
    check.entries(counts, positions)
    check.query(q, tokens=False)
    check.attention(None, window_start, sinks, bias, None, softcap)
    check.index(index, index_counts, index_pages)
    if statistics is not None:
        check.plain("statistics", statistics, torch.float32, check.per_entry)
    check.live_pages()


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
    softcap: float,
    statistics_decay: float,
    statistics_max: bool,
    plan: Tensor | None,
) -> None:
    check = _View("latent_attention")
    check.view(k_pages, v_pages, table)
    for name, size, most in (("k_pages", check.k_dim, MAX_LATENT), ("v_pages", check.v_dim, MAX_ROPE)):
        if not 1 <= size <= most:
            raise check.value_error(f"{name} has width {size}, needs 1 to {most}")
    if check.heads != 1:
        raise check.value_error(f"table has {check.heads} heads, needs 1")
    check.entries(counts, positions)
    check.strided("q_latent", q_latent, STORAGE, [*check.per_row, ("Hq", None), ("T", None), ("L", check.k_dim)])
    _, heads, tokens, _ = q_latent.shape
    check.strided("q_rope", q_rope, STORAGE, [*check.per_row, ("Hq", heads), ("T", tokens), ("Dr", check.v_dim)])
    if q_rope.dtype != q_latent.dtype:
        raise TypeError(f"{check.op}: q_rope has another dtype than q_latent")
    check.query_heads, check.tokens = heads, tokens
    per_token: Dims = [*check.per_row, ("T", tokens)]
    for name, x in (("q_positions", q_positions), ("window_start", window_start)):
        if x is not None:
            check.plain(name, x, torch.int32, per_token)
    if not softcap >= 0:
        raise check.value_error(f"softcap is {softcap:f}, needs 0 (none) or more")
    if statistics is not None:
        if tokens != 1:
            raise check.value_error(f"statistics needs T=1, q_latent has T={tokens}")
        check.plain("statistics", statistics, torch.float32, check.per_entry)
    check.live_pages()


def plan_decode(counts: Tensor, added: int, most: int, workers: int) -> None:
    check = _Checker("plan_decode")
    check.plain("counts", counts, torch.int32, [("L", None), ("R", None), ("H", None)])
    for name, value in (("added", added), ("most", most), ("workers", workers)):
        if not 0 <= value < 2**31:
            raise check.value_error(f"{name} is {value}, needs 0 or more")


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
    softcap: float,
    last: int,
    reduce_max: bool,
) -> None:
    check = _View("column_sums")
    check.view(k_pages, None, table)
    check.head_sizes(k_pages, None)
    check.entries(counts, positions)
    check.query(q, tokens=True)
    check.attention(q_positions, window_start, None, bias, mask, softcap)
    check.plain("lse", lse, torch.float32, [*check.per_row, ("Hq", check.query_heads), ("T", check.tokens)])
    if last < 0:
        raise check.value_error(f"last is {last}, needs 0 (all) or more")
    check.live_pages()


def _candidates(
    check: _View, q: Tensor, counts: Tensor, positions: Tensor, first: Tensor, end: Tensor, per_head: bool
) -> None:
    """What selection_scores and page_scores share."""
    check.entries(counts, positions)
    check.query(q, tokens=False)
    check.plain("first", first, torch.int32, check.per_row)
    check.plain("end", end, torch.int32, check.per_row)
    if not per_head and check.heads:
        for r, h in (counts != counts[:, :1]).nonzero().tolist():
            raise check.value_error(
                f"counts of head ({r}, {h}) differs from its row's first head; without per_head all heads must "
                "hold the same entries"
            )
    check.live_pages()


def selection_scores(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool,
    per_head: bool,
    pages: Tensor | None,
    page_counts: Tensor | None,
) -> None:
    check = _View("selection_scores")
    check.view(k_pages, None, table)
    check.head_sizes(k_pages, None)
    _candidates(check, q, counts, positions, first, end, per_head)
    if (pages is None) != (page_counts is None):
        raise check.value_error("pages and page_counts need each other")
    if pages is not None and page_counts is not None:
        voters: Dims = [*check.per_row, ("heads", check.heads if per_head else 1)]
        check.plain("pages", pages, torch.int32, [*voters, ("W", None)])
        check.plain("page_counts", page_counts, torch.int32, voters)
        held = (counts + check.page_size - 1).div(check.page_size, rounding_mode="floor")
        if not per_head:
            held = held[:, :1] if check.heads else counts.new_zeros(check.rows, 1)
        check.listed_pages(pages, page_counts, held)


def page_scores(
    q: Tensor,
    bounds: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool,
    per_head: bool,
) -> None:
    check = _View("page_scores")
    check.dtype("bounds", bounds, *STORAGE)
    check.shape("bounds", bounds, [("P", None), ("2", 2), ("Dk", None)])
    check.pages, _, check.k_dim = bounds.shape
    check.bounds(bounds, bounds.dtype)
    if not 1 <= check.k_dim <= MAX_HEAD_SIZE:
        raise check.value_error(f"bounds has head size {check.k_dim}, needs 1 to {MAX_HEAD_SIZE}")
    check.plain("table", table, torch.int32, [("R", None), ("H", None), ("M", None)])
    rows, heads, width = table.shape
    check.dtype("positions", positions, torch.int32)
    check.shape("positions", positions, [("R", rows), ("H", heads), ("C", None)])
    capacity = positions.shape[2]
    if capacity % width if width else capacity:
        raise check.value_error(
            f"positions has a capacity of {capacity}, needs a multiple of the table's width M={width}"
        )
    check.page_table("table", table, capacity // width if width else 1)
    _candidates(check, q, counts, positions, first, end, per_head)


def query_similarity(a: Tensor, b: Tensor) -> None:
    check = _Checker("query_similarity")
    check.strided("a", a, STORAGE, [("R", None), ("Hq", None), ("D", None)])
    check.strided("b", b, STORAGE, [("R", a.shape[0]), ("Hq", a.shape[1]), ("D", a.shape[2])])


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
    scale: float,
    soft: bool,
    shortlist: int,
) -> None:
    check = _View("select_tokens")
    check.view(k_pages, None, table)
    check.head_sizes(k_pages, None)
    check.entries(counts, positions)
    check.query(q, tokens=False)
    check.plain("q_positions", q_positions, torch.int32, check.per_row)
    if (cos is None) != (sin is None):
        raise check.value_error("cos and sin need each other")
    if cos is not None and sin is not None:
        check.plain("cos", cos, torch.float32, [*check.per_row, ("half", None)])
        check.plain("sin", sin, torch.float32, [*check.per_row, ("half", cos.shape[1])])
        if 2 * cos.shape[1] > check.k_dim:
            raise check.value_error(f"cos has {cos.shape[1]} angles, needs at most half of Dk={check.k_dim}")
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
        if shortlist < 1:
            raise check.value_error(f"shortlist is {shortlist}, needs 1 or more with bounds")
    check.dtype("query", query, *STORAGE)
    if query.dtype != q.dtype:
        raise TypeError(f"{check.op}: query has another dtype than q")
    check.shape("query", query, [*check.per_row, ("Hq", check.query_heads), ("Dk", check.k_dim)])
    check.contiguous("query", query)
    check.place("query", query)
    one = ("1", 1)
    check.plain("index", index, torch.int32, [*check.per_row, one, ("W", None)])
    check.plain("index_counts", index_counts, torch.int32, [*check.per_row, one])
    check.plain("until", until, torch.int32, check.per_row)
    check.plain("at", at, torch.int32, check.per_row)
    check.plain("events", events, torch.int32, [("2", 2)])
    for r, h in (counts != counts[:, :1]).nonzero().tolist() if check.heads else ():
        raise check.value_error(
            f"counts of head ({r}, {h}) differs from its row's first head; all heads must hold the same entries"
        )
    check.live_pages()
    for name, value, least in (("sinks", sinks, 0), ("k", k, 1), ("local", local, 1)):
        if value < least:
            raise check.value_error(f"{name} is {value}, needs {least} or more")
    width = index.shape[2]
    if width < sinks + k + local:
        raise check.value_error(f"index has room for {width} slots, needs sinks + k + local = {sinks + k + local}")
    for r, (n, covered) in enumerate(zip(index_counts[:, 0].tolist(), until.tolist())):
        if not 0 <= n <= width:
            raise check.value_error(f"index_counts of row {r} is {n}, needs 0 to W={width}")
        if covered < n:
            raise check.value_error(f"until of row {r} is {covered}, needs the {n} slots of its list or more")


def topk(
    scores: Tensor,
    counts: Tensor,
    positions: Tensor,
    k: Tensor,
    first: Tensor,
    end: Tensor,
    width: int,
    pages: Tensor | None,
    page_counts: Tensor | None,
    page_size: int,
) -> None:
    check = _View("topk")
    check.strided("scores", scores, (torch.float32,), [("R", None), ("H", None), ("C", None)])
    rows, heads, capacity = scores.shape
    per_head: Dims = [("R", rows), ("H", heads)]
    if (pages is None) != (page_counts is None):
        raise check.value_error("pages and page_counts need each other")
    if pages is not None and page_counts is not None:
        if page_size < 1:
            raise check.value_error(f"page_size is {page_size}, needs 1 or more with pages")
        check.strided("pages", pages, (torch.int32,), [*per_head, ("W", None)])
        check.strided("page_counts", page_counts, (torch.int32,), per_head)
        check.shape("scores", scores, [*per_head, ("W*page_size", pages.shape[2] * page_size)])
    check.strided("counts", counts, (torch.int32,), per_head)
    per_slot = ("C", capacity if pages is None else None)
    check.strided("positions", positions, (torch.int32,), [*per_head, per_slot])
    capacity = positions.shape[2]
    check.strided("k", k, (torch.int32,), per_head)
    check.plain("first", first, torch.int32, per_head[:1])
    check.plain("end", end, torch.int32, per_head[:1])
    if width < 0:
        raise check.value_error(f"width is {width}, needs 0 or more")
    check.counts_in_range(counts, capacity)
    if pages is not None and page_counts is not None:
        check.listed_pages(pages, page_counts, -(-capacity // page_size))


def choose_victims(
    scores: Tensor | None, counts: Tensor, positions: Tensor, budgets: Tensor, first: Tensor, end: Tensor
) -> None:
    check = _View("choose_victims")
    check.strided("positions", positions, (torch.int32,), [("R", None), ("H", None), ("C", None)])
    rows, heads, capacity = positions.shape
    per_head: Dims = [("R", rows), ("H", heads)]
    if scores is not None:
        check.strided("scores", scores, (torch.float32,), [*per_head, ("C", capacity)])
    check.strided("counts", counts, (torch.int32,), per_head)
    check.strided("budgets", budgets, (torch.int32,), per_head)
    check.plain("first", first, torch.int32, per_head[:1])
    check.plain("end", end, torch.int32, per_head[:1])
    check.counts_in_range(counts, capacity)


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
    bounds: Tensor | None,
) -> None:
    check = _View("evict")
    names = ("table", "counts", "positions", "columns", "scores", "budgets", "first", "end")
    lists = (table, counts, positions, columns, scores, budgets, first, end)
    for name, values in zip(names, lists):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{check.op}: {name} is {type(values).__name__}, needs a list of tensors")
    check.page_arrays(k_pages, v_pages)
    if bounds is not None:
        check.bounds(bounds, k_pages.dtype)
    for name, values in zip(names, lists):
        if len(values) != len(table) and not (name == "scores" and not values):
            raise check.value_error(f"{name} lists {len(values)} layers, needs {len(table)} as table does")
    for layer in range(len(table)):
        check.op = f"evict: layer {layer}"
        check.page_table("table", table[layer], k_pages.shape[1])
        check.entries(counts[layer], positions[layer])
        check.columns(columns[layer])
        for name, size, got, want in (
            ("table", "R", check.rows, table[0].shape[0]),
            ("columns", "N", columns[layer].shape[0], columns[0].shape[0]),
        ):
            if got != want:
                raise check.value_error(f"{name} has {size}={got}, needs {size}={want} as layer 0 has")
        of_layer = scores[layer] if scores else None
        if of_layer is not None:
            check.strided("scores", of_layer, (torch.float32,), check.per_entry)
        check.strided("budgets", budgets[layer], (torch.int32,), check.per_head)
        check.plain("first", first[layer], torch.int32, check.per_row)
        check.plain("end", end[layer], torch.int32, check.per_row)
    for layer in range(len(table)):
        check.op = f"evict: layer {layer}"
        held = (counts[layer], positions[layer])
        of_layer = scores[layer] if scores else None
        victims = reference.choose_victims(of_layer, *held, budgets[layer], first[layer], end[layer])
        none = victims < 0
        for slot in (victims, counts[layer] - 1):
            check.page_ids("table", table[layer], slot.masked_fill(none, 0), (slot + 1).masked_fill(none, 0))


def page_bounds(k_pages: Tensor, table: Tensor, counts: Tensor, bounds: Tensor) -> None:
    check = _View("page_bounds")
    check.view(k_pages, None, table)
    check.plain("counts", counts, torch.int32, check.per_head)
    check.counts_in_range(counts, check.capacity)
    check.counts = counts
    check.bounds(bounds, k_pages.dtype)
    check.live_pages()


def active_rows(mask: Tensor) -> None:
    _Checker("active_rows").plain("mask", mask, torch.bool, [("n", None)])


def _rows(check: _Checker, x: Tensor, index: Tensor) -> None:
    check.dtype("x", x, *STORAGE)
    check.shape("x", x, [("n", None), ("D", None)])
    check.contiguous("x", x)
    check.place("x", x)
    check.plain("index", index, torch.int32, [("m", None)])
    for i in index.tolist():
        if not -1 <= i < x.shape[0]:
            raise check.value_error(f"index holds {i}, needs -1 to n-1={x.shape[0] - 1}")


def gather_rows(x: Tensor, index: Tensor) -> None:
    _rows(_Checker("gather_rows"), x, index)


def scatter_rows(x: Tensor, rows: Tensor, index: Tensor) -> None:
    check = _Checker("scatter_rows")
    _rows(check, x, index)
    if not isinstance(rows, Tensor):
        raise TypeError(f"{check.op}: rows is {type(rows).__name__}, needs a tensor")
    if rows.dtype != x.dtype:
        raise TypeError(f"{check.op}: rows has another dtype than x")
    check.shape("rows", rows, [("m", index.shape[0]), ("D", x.shape[1])])
    check.contiguous("rows", rows)
    check.place("rows", rows)
