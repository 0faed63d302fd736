"""The eviction step of all layers of a model: choose_victims, together with overwrite, and evict.

    python bench/kernels/choose_victims.py [options: bench/kernels/common.py]

Rows are layers times batch: one launch serves them all. evict gets the same layers as lists and is the step of a model:
one call, nothing else. The baseline is torch: hide the protected, argmin. Bytes: the score and the position of every
entry.
"""

import torch
from common import main, pages_of
from devices import Bench

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """layers, batch, kv heads, entries, whether scores decide (else the oldest goes)"""
    if bench.kind == "emulated":
        return [(2, 2, 2, 96, True), (2, 1, 2, 96, False)]
    some = [(32, 1, 8, 512, True), (32, 1, 8, 4096, True), (32, 8, 8, 2048, True), (32, 1, 8, 4096, False)]
    some += [(1, 1, 8, 131072, True)]  # few long heads: each is cut into pieces
    if bench.options.full:
        some += [(80, 1, 8, 4096, True), (32, 64, 8, 1024, True)]
    return some[:2] if bench.options.quick else some


def measure(bench, layers, batch, heads, entries, scored):
    rows, dim = layers * batch, 64 if bench.kind == "emulated" else 128
    nbytes = rows * heads * entries * (8 if scored else 4)
    copies = bench.copies(rows * heads * entries * dim * 4)
    pages = [pages_of(bench, rows, heads, entries, dim, torch.bfloat16) for _ in range(copies)]
    columns = [torch.rand(1, *x.positions.shape, device=bench.device) for x in pages]
    budgets = torch.full_like(pages[0].counts, entries - 1)
    first, end = bench.ints([4] * rows), bench.ints([entries - 16] * rows)

    def choose(c):
        return ops.choose_victims(
            columns[c][0] if scored else None, pages[c].counts, pages[c].positions, budgets, first, end
        )

    def lists(x):
        return list(x.unflatten(0, (layers, batch)).unbind())

    limits = (lists(budgets), lists(first), lists(end))
    of_layers = []
    for x, y in zip(pages, columns):
        own = [lists(z) for z in (x.table, x.counts, x.positions)]
        scores = lists(y[0])
        of_layers.append((x.k, x.v, *own, [z[None] for z in scores], scores if scored else [], *limits))

    def by_torch(c):
        p = pages[c].positions
        hidden = (p < first[:, None, None]) | (p >= end[:, None, None])
        return (columns[c][0] if scored else p.float()).masked_fill(hidden, float("inf")).argmin(-1)

    assert torch.equal(choose(0).long(), by_torch(0))
    runs = {
        "ours": choose, "torch|": by_torch,
        "with overwrite": lambda c: ops.overwrite(*pages[c].args(), columns[c], choose(c)),
        "evict": lambda c: ops.evict(*of_layers[c]),
    }  # fmt: skip
    times = bench.compare(
        runs, copies, pools=lambda c: (columns[c], pages[c].positions), touched=nbytes,
        reset=lambda c: pages[c].counts.fill_(entries),
    )  # fmt: skip
    cells = {"layers": layers, "batch": batch, "heads": heads, "entries": entries, "by": "score" if scored else "age"}
    row = bench.row(cells, times, nbytes=nbytes, peers=("torch",))
    for name in ("with overwrite", "evict"):
        row[f"{name} {bench.time_unit}"] = bench.shown(times.seconds[name])
    return [row]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
