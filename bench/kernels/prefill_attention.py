"""Paged prefill attention against torch's SDPA and, on a GPU, other people's kernels: prompts, chunks and drafts.

    python bench/kernels/prefill_attention.py [options: bench/kernels/common.py]

The last of T queries sees the last entry, all are causal. Flops are those of the visible scores; what a kernel spends
on hidden ones counts against it. On processors with AMX, torch multiplies bfloat16 in it, which is faster than the
float32 peak that is the limit there.
"""

import torch
from common import DTYPES, main, name_of, pages_of
from devices import Bench
from peers import Work, attention_peers

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """rows, queries, context, query heads, kv heads, head size, dtype"""
    if bench.kind == "emulated":
        return [(2, 5, 144, 8, 2, 64, "bfloat16"), (1, 80, 80, 4, 2, 128, "float16")]
    if bench.kind == "cpu":
        some = [(512, 32, 8, 128), (2048, 32, 8, 128), (4096, 8, 2, 64), (2048, 8, 8, 128)]
        kinds = ("float32", "bfloat16") if bench.options.quick else DTYPES
        return [(1, s[0], *s, kind) for s in (some[:2] if bench.options.quick else some) for kind in kinds]
    some = [
        (1, 4096, 4096, 32, 8, 128), (1, 16384, 16384, 32, 8, 128), (1, 512, 32768, 32, 8, 128),
        (8, 5, 8192, 32, 8, 128), (1, 512, 512, 32, 8, 128), (4, 2048, 2048, 32, 32, 64),
        (1, 4096, 4096, 16, 8, 256),
    ]  # fmt: skip
    if bench.options.full:
        some += [(b, t, n, *h, 128) for h in ((32, 8), (64, 8), (8, 8)) for b, t, n in (
            (1, 1024, 1024), (8, 2048, 2048), (1, 32768, 32768), (1, 2048, 131072), (1, 16, 131072), (32, 3, 4096),
        )]  # fmt: skip
    return [(*shape, "bfloat16") for shape in (some[:2] if bench.options.quick else some)]


def measure(bench, rows, tokens, context, query_heads, heads, dim, kind):
    dtype, scale = DTYPES[kind], dim**-0.5
    nbytes = 2 * rows * heads * context * dim * dtype.itemsize
    cells = {
        "rows": rows, "queries": tokens, "context": context, "heads": f"{query_heads}/{heads}x{dim}",
        "dtype": name_of(dtype),
    }  # fmt: skip
    if not bench.fits(2 * nbytes):
        print(f"does not fit this device: {cells}")
        return []
    copies = 1 if bench.kind == "cpu" else bench.copies(nbytes + 2 * rows * tokens * query_heads * dim * dtype.itemsize)
    pages = [pages_of(bench, rows, heads, context, dim, dtype) for _ in range(copies)]
    q = [bench.randn(rows, query_heads, tokens, dim, dtype=dtype) for _ in range(copies)]
    place = torch.arange(context - tokens, context, dtype=torch.int32, device=bench.device).repeat(rows, 1)

    def call(c, in_order=False):
        nothing = (None, None, None, None, None, None)
        return ops.prefill_attention(q[c], *pages[c].args(in_order), place, *nothing, scale)[0]

    peers, names = attention_peers(Work(bench, q, pages, scale), lambda c: call(c, True))
    times = bench.compare({"ours": call, **peers}, copies, pools=lambda c: (pages[c].k, pages[c].v, q[c]))
    flops = 4 * rows * query_heads * dim * tokens * (context - (tokens - 1) / 2)
    return [bench.row(cells, times, nbytes=nbytes, flops=flops, peers=names)]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
