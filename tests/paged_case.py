"""Random paged storage for the tests of the ops: ragged counts, permuted pages, NaN in everything that is dead."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NAN = float("nan")
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Paged:
    """One layer's storage; the fields are the ops' arguments."""

    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    counts: Tensor
    positions: Tensor
    columns: Tensor

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.k_pages, self.v_pages, self.table, self.counts, self.positions, self.columns)

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]

    def clone(self) -> Paged:
        return copy.deepcopy(self)

    def assert_equal(self, other: Paged) -> None:
        """Bit for bit, dead slots included: nothing may be written where no entry is."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            assert torch.equal(bits(mine), bits(theirs)), field.name


def bits(x: Tensor) -> Tensor:
    """Same values as integers, so that NaN equals NaN; all NaNs are one."""
    if not x.dtype.is_floating_point:
        return x
    x = torch.where(x.isnan(), torch.full_like(x, NAN), x)
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def make_paged(
    *,
    rows: int,
    heads: int,
    page_size: int,
    k_dim: int,
    v_dim: int,
    n_columns: int = 1,
    dtype: torch.dtype = torch.float32,
    max_count: int = 40,
    room: int = 0,
    same_counts: bool = False,
    seed: int = 0,
) -> Paged:
    """``room`` more entries fit into every head's pages; the table is exactly as wide as the fullest head needs."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, max_count + 1, (rows, heads), generator=g, dtype=torch.int32)
    if same_counts:
        counts = counts[:, :1].expand(rows, heads).clone() if heads else counts
    elif counts.numel():
        counts.view(-1)[int(torch.randint(counts.numel(), (), generator=g))] = 0
    needed = (counts + room + page_size - 1) // page_size
    width = int(needed.max()) if needed.numel() else 0
    used = int(needed.sum())
    pages = used + 3
    order = torch.randperm(pages, generator=g, dtype=torch.int32)
    table = torch.full((rows, heads, width), -1, dtype=torch.int32)
    at = 0
    for r in range(rows):
        for h in range(heads):
            n = int(needed[r, h])
            table[r, h, :n] = order[at : at + n]
            at += n
    capacity = width * page_size
    k_pages = torch.full((pages, page_size, k_dim), NAN, dtype=dtype)
    v_pages = torch.full((pages, page_size, v_dim), NAN, dtype=dtype)
    positions = torch.full((rows, heads, capacity), 2**30, dtype=torch.int32)
    columns = torch.full((n_columns, rows, heads, capacity), NAN)
    for r in range(rows):
        for h in range(heads):
            n = int(counts[r, h])
            slots = torch.arange(n)
            page = table[r, h, slots // page_size].long()
            k_pages[page, slots % page_size] = torch.randn(n, k_dim, generator=g).to(dtype)
            v_pages[page, slots % page_size] = torch.randn(n, v_dim, generator=g).to(dtype)
            spread = torch.randperm(2 * max_count + 1, generator=g, dtype=torch.int32)
            positions[r, h, :n] = spread[:n]
            columns[:, r, h, :n] = torch.randn(n_columns, n, generator=g)
    return Paged(k_pages, v_pages, table, counts, positions, columns)


def strided(x: Tensor) -> Tensor:
    """The same values as a view with unusual strides, the innermost one 1: as Hugging Face's transposed projections."""
    padded = torch.full((x.shape[2], x.shape[0] + 1, x.shape[1] + 2, x.shape[3] + 3), NAN, dtype=x.dtype)
    view = padded[:, 1:, 2:, 3:].permute(1, 2, 0, 3)
    view.copy_(x)
    return view
