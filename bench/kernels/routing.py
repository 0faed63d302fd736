"""Rows of a batch that a layer really computes: active_rows, gather_rows, scatter_rows, against torch's indexing.

    python bench/kernels/routing.py [options: bench/kernels/common.py]

torch's nonzero waits for the GPU, so that it cannot be part of a captured step.
"""

import torch
from common import DTYPES, main, name_of
from devices import Bench

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """rows, width, dtype; half of the rows are active"""
    if bench.kind == "emulated":
        return [(70, 48, "bfloat16")]
    if bench.kind == "cpu":
        return [(64, 4096, "float32"), (4096, 2048, "bfloat16")]
    some = [(64, 4096, "bfloat16"), (8192, 4096, "bfloat16"), (16384, 8192, "bfloat16")]
    return some[:2] if bench.options.quick else some


def measure(bench, n, width, kind):
    dtype = DTYPES[kind]
    copies = bench.copies(n * width * dtype.itemsize)
    x = [bench.randn(n, width, dtype=dtype) for _ in range(copies)]
    mask = [torch.rand(n, device=bench.device) < 0.5 for _ in range(copies)]
    active = [ops.active_rows(m) for m in mask]
    index = [i[: int(count)].contiguous() for i, count in active]
    long = [i.long() for i in index]
    picked = [ops.gather_rows(x[c], index[c]) for c in range(copies)]
    assert torch.equal(picked[0], x[0][mask[0]])
    pairs = {
        "active_rows": (lambda c: ops.active_rows(mask[c]), lambda c: mask[c].nonzero(), 5 * n),
        "gather_rows": (
            lambda c: ops.gather_rows(x[c], index[c]), lambda c: x[c].index_select(0, long[c]),
            2 * picked[0].nbytes,
        ),
        "scatter_rows": (
            lambda c: ops.scatter_rows(x[c], picked[c], index[c]), lambda c: x[c].index_copy_(0, long[c], picked[c]),
            2 * picked[0].nbytes,
        ),
    }  # fmt: skip
    rows = []
    for op, (ours, theirs, nbytes) in pairs.items():
        times = bench.compare({"ours": ours, "torch|": theirs}, copies, pools=lambda c: (x[c],), touched=nbytes)
        cells = {"op": op, "rows": n, "active": len(index[0]), "width": width, "dtype": name_of(dtype)}
        rows.append(bench.row(cells, times, nbytes=nbytes, peers=("torch",)))
    return rows


if __name__ == "__main__":
    main(__doc__, shapes, measure)
