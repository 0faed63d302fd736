"""Paged decode attention, one query per row, against torch's SDPA and, on a GPU, other people's kernels.

    python bench/kernels/decode_attention.py [options: bench/kernels/common.py]

Pages of 16 entries lie in random order. Peers read contiguous keys and values, or pages of their own layout.
"statistics" is what heavy hitters cost: the attention probabilities added to the score column in the same call. "plan"
shares out the entries of 32 layers, once per step, and is not part of the other times. On a CPU also: the same call
with the pages in order, and "listed", an eighth of the entries, picked at random (what sparse decode reads), each as a
share of its own limit.
"""

import torch
from common import DTYPES, main, name_of, pages_of
from devices import Bench
from peers import Work, attention_peers

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """rows, context, query heads, kv heads, head size, dtype"""
    if bench.kind == "emulated":
        return [(2, 320, 8, 2, 64, "bfloat16")]
    if bench.kind == "cpu":
        some = [
            (1, 8192, 32, 8, 128), (1, 32768, 8, 2, 64), (1, 512, 32, 8, 128), (8, 2048, 32, 8, 128),
            (1, 4096, 32, 32, 128), (1, 32768, 32, 8, 128), (1, 8192, 8, 2, 64), (8, 4096, 8, 2, 64),
        ]  # fmt: skip
        kinds = DTYPES if bench.options.full else ("float32", "bfloat16")
        return [(*shape, kind) for shape in (some[:2] if bench.options.quick else some) for kind in kinds]
    if bench.options.full:
        heads = ((32, 8), (32, 4), (64, 8), (8, 8))
        contexts = (1024, 4096, 16384, 32768, 131072)
        return [(b, n, *h, 128, "bfloat16") for h in heads for n in contexts for b in (1, 4, 8, 32, 128)]
    some = [
        (1, 4096, 32, 8), (1, 32768, 32, 8), (8, 32768, 32, 8), (1, 32768, 32, 4), (1, 1024, 32, 8), (8, 4096, 32, 8),
        (32, 4096, 64, 8), (1, 131072, 32, 8), (8, 16384, 8, 8), (128, 4096, 32, 8),
    ]  # fmt: skip
    return [(*shape, 128, "bfloat16") for shape in (some[:3] if bench.options.quick else some)]


def measure(bench, rows, context, query_heads, heads, dim, kind):
    dtype, scale = DTYPES[kind], dim**-0.5
    nbytes = 2 * rows * heads * context * dim * dtype.itemsize
    cells = {"rows": rows, "context": context, "heads": f"{query_heads}/{heads}x{dim}", "dtype": name_of(dtype)}
    if not bench.fits(nbytes):
        print(f"does not fit this device: {cells}")
        return []
    copies = bench.copies(nbytes)
    pages = [pages_of(bench, rows, heads, context, dim, dtype) for _ in range(copies)]
    q = [bench.randn(rows, query_heads, dim, dtype=dtype) for _ in range(copies)]
    statistics = [torch.zeros(x.positions.shape, device=bench.device) for x in pages]
    plan = None if bench.kind == "cpu" else ops.plan_decode(pages[0].counts[None], 0, context)[0]

    def call(c, in_order=False, **changes):
        nothing = (None, None, None, None, None)
        arguments = {"statistics": None, "scale": scale, "plan": plan, **changes}
        return ops.decode_attention(q[c], *pages[c].args(in_order), *nothing, **arguments)[0]

    peers, names = attention_peers(Work(bench, [x[:, :, None] for x in q], pages, scale), lambda c: call(c, True))
    runs = {"ours": call, "ours, statistics": lambda c: call(c, statistics=statistics[c]), **peers}
    listed = context // 8
    if bench.kind == "cpu":
        lists = [torch.randperm(context)[:listed].sort()[0].int().repeat(rows, 1, 1) for _ in range(copies)]
        lengths = bench.ints([[listed]] * rows)
        runs["ours, in order"] = lambda c: call(c, True)
        runs["ours, listed"] = lambda c: ops.decode_attention(
            q[c], *pages[c].args(), None, None, None, lists[c], lengths, None, scale
        )[0]
    else:
        layers = pages[0].counts.repeat(32, 1, 1)
        runs["ours, plan"] = lambda c: ops.plan_decode(layers, 0, context)
    times = bench.compare(runs, copies, pools=lambda c: (pages[c].k, pages[c].v))
    flops = 4 * rows * query_heads * context * dim if bench.kind == "cpu" else 0  # a GPU's are never the limit
    row = bench.row(cells, times, nbytes=nbytes, flops=flops, peers=names)
    plain, counted = times.seconds["ours"], times.seconds["ours, statistics"]
    row["statistics +%"] = 100 * (counted / plain - 1) if plain and counted else None
    for name, share in (("in order", 1), ("listed", 1 / 8)) if bench.kind == "cpu" and plain else ():
        taken = times.seconds[f"ours, {name}"]
        row[f"{name} {bench.time_unit}"] = bench.shown(taken)
        row[f"{name} % of limit"] = row["% of limit"] * share * plain / taken
    if "ours, plan" in runs:
        row[f"plan {bench.time_unit}"] = bench.shown(times.seconds["ours, plan"])
    return [row]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
