"""Writing the storage: append (a decode step, a prompt), copy_pages, compact, overwrite, page_bounds.

    python bench/kernels/storage.py [options: bench/kernels/common.py]

The baseline is torch's indexing on the same pools, with the places worked out beforehand. Bytes: read plus written.
What an op changes is put back between calls, outside the measured time.
"""

import torch
from common import DTYPES, main, name_of, pages_of
from devices import Bench

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """op, rows, entries before, tokens or pages or entries kept, kv heads, head size, dtype"""
    if bench.kind == "emulated":
        return [
            ("append", 2, 32, 1, 2, 64, "bfloat16"), ("append", 1, 0, 48, 2, 64, "bfloat16"),
            ("copy_pages", 1, 160, 6, 2, 64, "bfloat16"), ("compact", 1, 160, 90, 2, 64, "bfloat16"),
            ("overwrite", 3, 64, 1, 2, 64, "bfloat16"), ("page_bounds", 1, 160, 160, 2, 64, "bfloat16"),
        ]  # fmt: skip
    if bench.kind == "cpu":
        some = [
            ("append", 1, 4096, 1), ("append", 1, 0, 2048), ("copy_pages", 1, 4096, 512), ("compact", 1, 4096, 2048),
            ("overwrite", 32, 256, 1), ("page_bounds", 1, 4096, 4096),
        ]  # fmt: skip
    else:  # overwrite: 32 layers of a model at once
        some = [
            ("append", 1, 4096, 1), ("append", 128, 1024, 1), ("append", 1, 0, 16384), ("copy_pages", 1, 32768, 4096),
            ("compact", 8, 8192, 4096), ("overwrite", 32, 2048, 1), ("overwrite", 256, 512, 1),
            ("page_bounds", 1, 32768, 32768),
        ]  # fmt: skip
    return [(*s, 8, 128, "bfloat16") for s in (some[:3] if bench.options.quick else some)]


class Store:
    """One set of inputs: pages with room, and what the ops take beside them."""

    def __init__(self, bench, op, rows, n, amount, heads, dim, dtype):
        room = n + (-(-amount // 16) * 16 if op == "append" else 0)
        self.n = n
        self.pages = pages_of(bench, rows, heads, room, dim, dtype)
        self.columns = torch.zeros(1, *self.pages.positions.shape, device=bench.device)
        self.k, self.v = (bench.randn(rows, heads, amount, dim, dtype=dtype) for _ in range(2))
        self.places = torch.arange(n, n + amount, device=bench.device).int().repeat(rows, 1)
        slots = torch.arange(n, n + amount, device=bench.device)
        if op == "compact":
            slots = torch.randperm(n, device=bench.device)[:amount].sort()[0]
        if op in ("append", "compact"):
            self.page, self.slot = self.pages.table[:, :, slots // 16].long(), slots % 16
        self.keep = slots.int().repeat(rows, heads, 1)
        self.keep_counts = torch.full_like(self.pages.counts, amount)
        total = len(self.pages.k)
        order = torch.randperm(total, device=bench.device).int()
        self.source, self.target = order[: total // 2][:amount], order[total // 2 :][:amount]
        self.victims = torch.full_like(self.pages.counts, n // 2)
        self.bounds = torch.zeros(total, 2, dim, dtype=dtype, device=bench.device)
        self.reset()

    def reset(self):
        self.pages.counts.fill_(self.n)

    @property
    def args(self):
        return (*self.pages.args(), self.columns)


def append(s):
    ops.append(*s.args, s.k, s.v, s.places)


def torch_append(s):
    s.pages.k[s.page, s.slot] = s.k
    s.pages.v[s.page, s.slot] = s.v


def copy_pages(s):
    ops.copy_pages(s.pages.k, s.pages.v, s.source, s.target)


def torch_copy_pages(s):
    for x in (s.pages.k, s.pages.v):
        x[s.target] = x[s.source]


def compact(s):
    ops.compact(
        s.pages.k, s.pages.v, s.pages.table, s.pages.table, s.pages.counts, s.pages.positions, s.columns, s.keep,
        s.keep_counts,
    )  # fmt: skip


def torch_compact(s):
    for x in (s.pages.k, s.pages.v):
        moved = x[s.page, s.slot]
        x[s.pages.table[:, :, : moved.shape[2] // 16].long()] = moved.view(*moved.shape[:2], -1, 16, moved.shape[3])


def overwrite(s):
    ops.overwrite(*s.args, s.victims)


def torch_overwrite(s):
    last, victim = s.n - 1, s.n // 2
    for x in (s.pages.k, s.pages.v):
        x[s.pages.table[:, :, victim // 16], victim % 16] = x[s.pages.table[:, :, last // 16], last % 16]


def page_bounds(s):
    ops.page_bounds(s.pages.k, s.pages.table, s.pages.counts, s.bounds)


def torch_page_bounds(s):
    torch.stack(s.pages.k.aminmax(dim=1), 1, out=s.bounds)


OPS = {
    "append": (append, torch_append), "copy_pages": (copy_pages, torch_copy_pages), "compact": (compact, torch_compact),
    "overwrite": (overwrite, torch_overwrite), "page_bounds": (page_bounds, torch_page_bounds),
}  # fmt: skip


def measure(bench, op, rows, n, amount, heads, dim, kind):
    dtype = DTYPES[kind]
    row_bytes = 2 * dim * dtype.itemsize  # a key and its value
    nbytes = {
        "append": 2 * rows * heads * amount * row_bytes, "copy_pages": 2 * amount * 16 * row_bytes,
        "compact": 2 * rows * heads * amount * row_bytes, "overwrite": 2 * rows * heads * row_bytes,
        "page_bounds": rows * heads * n * row_bytes // 2,
    }[op]  # fmt: skip
    copies = bench.copies(max(nbytes, rows * heads * (n + amount) * row_bytes))
    stores = [Store(bench, op, rows, n, amount - amount % 16 if op == "compact" else amount, heads, dim, dtype)
              for _ in range(copies)]  # fmt: skip
    ours, theirs = OPS[op]
    times = bench.compare(
        {"ours": lambda c: ours(stores[c]), "torch|": lambda c: theirs(stores[c])}, copies,
        pools=lambda c: (stores[c].pages.k, stores[c].pages.v), touched=nbytes, reset=lambda c: stores[c].reset(),
    )  # fmt: skip
    cells = {
        "op": op, "rows": rows, "heads": f"{heads}x{dim}", "entries": n, "amount": amount, "dtype": name_of(dtype)
    }  # fmt: skip
    return [bench.row(cells, times, nbytes=nbytes, peers=("torch",))]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
