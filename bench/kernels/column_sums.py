"""Attention column sums (H2O's score of a prompt) against the eager way: softmax(q k^T) as a whole, then the sum.

    python bench/kernels/column_sums.py [options: bench/kernels/common.py]

Eager attention has to keep heads x T x T probabilities; ours needs memory linear in T. Flops: the visible half of one
product. The log-sum-exp that ours starts from is a by-product of prefill_attention. "last 64" is SnapKV's observation
window.
"""

import torch
from common import DTYPES, main, name_of, pages_of
from devices import Bench

from kvcache import ops


def shapes(bench: Bench) -> list[tuple]:
    """tokens, query heads, kv heads, head size, last, maximum over the group, dtype"""
    if bench.kind == "emulated":
        return [(160, 4, 2, 64, 0, False, "bfloat16"), (160, 4, 2, 64, 32, True, "bfloat16")]
    if bench.kind == "cpu":
        some = [(1024, 32, 8, 128, 0), (2048, 32, 8, 128, 0), (2048, 8, 2, 64, 0), (4096, 32, 8, 128, 64)]
        some = some[:1] if bench.options.quick else some
        return [(*s, False, kind) for s in some for kind in ("float32", "bfloat16")]
    some = [(4096, 32, 8, 128, 0, False), (16384, 32, 8, 128, 0, False), (32768, 32, 8, 128, 64, False),
            (4096, 32, 8, 128, 0, True), (4096, 64, 8, 64, 0, False), (4096, 16, 8, 256, 0, False)]  # fmt: skip
    if bench.options.full:
        some += [(n, 32, h, 128, last, False) for n in (512, 2048, 65536) for h in (8, 32) for last in (0, 64)]
    return [(*s, "bfloat16") for s in (some[:2] if bench.options.quick else some)]


def measure(bench, tokens, query_heads, heads, dim, last, largest, kind):
    dtype, scale, group = DTYPES[kind], dim**-0.5, query_heads // heads
    nbytes = heads * tokens * dim * dtype.itemsize
    copies = 1 if bench.kind == "cpu" else bench.copies(nbytes * (1 + group))
    pages = [pages_of(bench, 1, heads, tokens, dim, dtype) for _ in range(copies)]
    q = [bench.randn(1, query_heads, tokens, dim, dtype=dtype) for _ in range(copies)]
    place = torch.arange(tokens, dtype=torch.int32, device=bench.device)[None]
    nothing = (None, None, None, None, None, None)
    lse = [ops.prefill_attention(q[c], *pages[c].args(), place, *nothing, scale)[1] for c in range(copies)]

    def call(c, in_order=False, level=None):
        keys = (pages[c].k, pages[c].in_order if in_order else pages[c].table, pages[c].counts, pages[c].positions)
        return ops.column_sums(
            q[c], *keys, place, lse[c] if level is None else level, None, None, None, scale, last=last,
            reduce_max=largest,
        )  # fmt: skip

    def eager(c):
        recent = q[c][:, :, -last:] if last else q[c]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=bench.device).triu(1)[-recent.shape[2] :]
        logits = (recent @ pages[c].dense()[0].repeat_interleave(group, 1).transpose(-1, -2)) * scale
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
        weights = weights.view(1, heads, group, *weights.shape[2:])
        return (weights.amax(2) if largest else weights.mean(2)).sum(2)

    rows = last or tokens
    peer = eager if query_heads * rows * tokens * 10 < 16e9 else "needs too much memory"
    if not isinstance(peer, str):
        _, level = ops.prefill_attention(q[0], *pages[0].args(True), place, *nothing, scale)
        close = {"rtol": 2e-2, "atol": 1e-3 if dtype == torch.float32 else 2e-2}
        torch.testing.assert_close(call(0, True, level), eager(0), **close)
    times = bench.compare({"ours": call, "eager": peer}, copies, pools=lambda c: (pages[c].k, q[c]))
    cells = {
        "tokens": tokens, "last": last, "group": "max" if largest else "mean", "heads": f"{query_heads}/{heads}x{dim}",
        "dtype": name_of(dtype),
    }  # fmt: skip
    flops = 2 * rows * (tokens - (rows - 1) / 2) * dim * query_heads
    return [bench.row(cells, times, nbytes=nbytes, flops=flops, peers=("eager",))]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
