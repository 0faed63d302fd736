"""Token selection for sparse decode (TokenSelect): every step of it, the exact chain and the two-stage one.

    python bench/kernels/selection.py [options: bench/kernels/common.py]

"scores": q·K over all pages, softmax per head, vote; "topk"; "attend" over the selection; "exact" is the three in a
row. "page scores": bounds of all pages; "two-stage" is bounds, shortlist (a page in eight), exact vote inside it, top
k and attention. "step reuses", "step selects" and "step in two stages" are select_tokens, a policy's whole step in one
op: the comparison with the query before, and what follows from it. "dense" reads everything. Keys come in stretches of
60 tokens about one thing and the query is about three of them, so that a shortlist can be right; "recall" is the share
of the exact selection that "two-stage" finds.

The baseline "torch" does the same on contiguous keys: packed matmul, softmax, sum over the heads; torch.topk; a gather
of keys and values, then SDPA. For the chains it is dense decode attention, ours. Bytes are those of the keys, bounds
and values that a step has to read.
"""

import torch
import torch.nn.functional as F
from common import DTYPES, main, name_of, pages_of
from devices import Bench

from kvcache import ops
from kvcache.ops.two_stage import selection_recall, two_stage_selection

SINKS, LOCAL = 128, 512  # protected at either end
SHARE, TIMES = 8, 4  # the shortlist: one page in SHARE, and at least room for TIMES k entries


def shapes(bench: Bench) -> list[tuple]:
    """context, query heads, kv heads, head size, k, dtype"""
    if bench.kind == "emulated":
        return [(1920, 4, 2, 64, 64, "bfloat16")]
    if bench.kind == "cpu":
        some = [(8192, 32, 8, 128, 1024), (32768, 32, 8, 128, 2048), (32768, 8, 2, 64, 2048)]
        return [(*s, kind) for s in (some[:1] if bench.options.quick else some) for kind in ("float32", "bfloat16")]
    some = [(131072, 32, 8, 128, 2048), (1 << 20, 32, 8, 128, 2048), (32768, 32, 8, 128, 2048)]
    if bench.options.full:
        some += [(131072, 64, 8, 128, 2048), (131072, 32, 4, 128, 2048), (524288, 32, 8, 128, 2048)]
    return [(*s, "bfloat16") for s in (some[:1] if bench.options.quick else some)]


def about_topics(bench, pages, dim, query_heads):
    """Gives the pages clustered keys; returns a query about three of the clusters."""
    rows, heads, width = pages.table.shape
    n = pages.positions.shape[2]
    topic = torch.arange(n, device=bench.device) // 60
    centres = bench.randn(rows, heads, int(topic.max()) + 1, dim)
    for h in range(heads):  # a head at a time: a million keys in float32 are many bytes
        keys = centres[:, h, topic] + 0.3 * bench.randn(rows, n, dim)
        pages.k[pages.table[:, h].long()] = keys.view(rows, width, -1, dim).to(pages.k.dtype)
    chosen = centres[:, :, torch.randperm(centres.shape[2], device=bench.device)[:3]].mean(2)
    q = chosen[:, :, None] + 0.1 * bench.randn(rows, heads, query_heads // heads, dim)
    return q.flatten(1, 2).to(pages.k.dtype)


def measure(bench, context, query_heads, heads, dim, k, kind):
    dtype, scale, group = DTYPES[kind], dim**-0.5, query_heads // heads
    keys = heads * context * dim * dtype.itemsize
    copies = bench.copies(2 * keys)
    pages = [pages_of(bench, 1, heads, context, dim, dtype) for _ in range(copies)]
    q = [about_topics(bench, x, dim, query_heads) for x in pages]
    sinks, local = min(SINKS, context // 16), min(LOCAL, context // 8)
    first, end, width = bench.ints([sinks]), bench.ints([context - local]), sinks + local + k
    best = bench.ints([[k]])
    shortlist = max(context // 16 // SHARE, -(-(sinks + local + TIMES * k) // 16) + 2)
    plan = None if bench.kind == "cpu" else ops.plan_decode(pages[0].counts[None], 0, context)[0]
    bounds = [torch.zeros(len(x.k), 2, dim, dtype=dtype, device=bench.device) for x in pages]
    for x, y in zip(pages, bounds):
        ops.page_bounds(x.k, x.table, x.counts, y)

    def scores(c):
        return ops.selection_scores(q[c], *pages[c].keys, first, end, scale)

    def choose(c, scored):
        x = pages[c]
        return ops.topk(scored, x.counts[:, :1], x.positions[:, :1], best, first, end, width)

    def attend(c, index, counts):
        return ops.decode_attention(q[c], *pages[c].args(), None, None, None, index, counts, None, scale)[0]

    def two_stage(c):
        x = pages[c]
        return two_stage_selection(
            q[c], x.k, bounds[c], x.table, x.counts, x.positions, first, end, scale, k, shortlist, width=width
        )

    def state(c):
        index = torch.full((1, 1, width + local), -1, dtype=torch.int32, device=bench.device)
        none = bench.ints([0])
        return [q[c].clone(), index, bench.ints([[0]]), none, none.clone(), bench.ints([0, 0])]

    def step(c, reuse, stages):
        x, (query, index, counts, until, at, events) = pages[c], states[c]
        ops.select_tokens(
            q[c], *x.keys, last, None, None, bounds[c] if stages else None, query, index, counts, until, at, events,
            sinks, k, local, reuse, scale, True, shortlist if stages else 0,
        )  # fmt: skip

    def dense(c):
        nothing = (None, None, None, None, None, None)
        return ops.decode_attention(q[c], *pages[c].args(), *nothing, scale, plan=plan)[0]

    def torch_scores(c):
        logits = (q[c].view(1, heads, group, dim) @ pages[c].dense()[0].transpose(-1, -2)).float() * scale
        return logits.softmax(-1).sum((1, 2))

    def torch_attend(c):
        few = (x[:, :, torch_chosen[c]] for x in pages[c].dense())
        return F.scaled_dot_product_attention(q[c].view(1, heads, group, dim), *few, scale=scale)

    scored, torch_scored = [scores(c) for c in range(copies)], [torch_scores(c) for c in range(copies)]
    chosen = [choose(c, scored[c]) for c in range(copies)]
    torch_chosen = [x[0].topk(width).indices for x in torch_scored]
    recall = selection_recall(*two_stage(0), *chosen[0], pages[0].positions, first, end).mean()
    states, last = [state(c) for c in range(copies)], bench.ints([context - 1])
    for c in range(copies):
        step(c, 0.9, False)
    runs = {
        "ours step reuses": lambda c: step(c, 0.9, False), "ours step selects": lambda c: step(c, 2.0, False),
        "ours step in two stages": lambda c: step(c, 2.0, True),
        "ours scores": scores, "ours topk": lambda c: choose(c, scored[c]),
        "ours attend": lambda c: attend(c, *chosen[c]),
        "ours page scores": lambda c: ops.page_scores(q[c], bounds[c], *pages[c].keys[1:], first, end, scale),
        "ours similarity": lambda c: ops.query_similarity(q[c], q[c - 1]),
        "torch scores": torch_scores, "torch topk": lambda c: torch_scored[c].topk(width).indices,
        "torch attend": torch_attend,
        "torch similarity": lambda c: F.cosine_similarity(q[c].float().flatten(1), q[c - 1].float().flatten(1)),
        "dense": dense,
    }  # fmt: skip
    whole = {
        "ours exact": lambda c: attend(c, *choose(c, scores(c))),
        "ours two-stage": lambda c: attend(c, *two_stage(c)),
    }  # fmt: skip
    times = bench.compare(runs | whole, copies, pools=lambda c: (pages[c].k, pages[c].v))
    read = 2 * heads * width * dim * dtype.itemsize
    stage = keys // 8 + shortlist * 16 * heads * dim * dtype.itemsize
    moved = {
        "scores": (keys, "torch scores"), "topk": (8 * context, "torch topk"), "attend": (read, "torch attend"),
        "page scores": (keys // 8, None), "similarity": (0, "torch similarity"), "exact": (keys + read, "dense"),
        "two-stage": (stage + read, "dense"), "step reuses": (0, None), "step selects": (keys, None),
        "step in two stages": (stage, None),
    }  # fmt: skip
    rows = []
    for op, (nbytes, peer) in moved.items():
        cells = {"context": context, "k": k, "heads": f"{query_heads}/{heads}x{dim}", "dtype": name_of(dtype), "op": op}
        row = bench.row(cells, times, nbytes=nbytes, ours=f"ours {op}")
        theirs = times.seconds[peer] if peer else None
        row |= {"baseline": peer, f"baseline {bench.time_unit}": bench.shown(theirs)}
        row["ratio"] = theirs / times.seconds[f"ours {op}"] if theirs else None
        row["recall"] = float(recall) if op == "two-stage" else None
        if op != "exact":
            del row["all"]  # once is enough
        rows.append(row)
    return rows


if __name__ == "__main__":
    main(__doc__, shapes, measure)
