"""Paged decode attention against torch's scaled_dot_product_attention.

    python bench/kernels/decode_attention.py [--out FILE.json] [--threads 1] [--cpu N] [--quick]

SDPA reads contiguous keys and values, ours reads pages of 16 entries: "in order", as a fresh pool hands them out, or
"shuffled", every page anywhere. "SDPA" is the better of the two ways in which models call it: enable_gqa, or repeat_kv
with its copy. "By hand" is the better of two that nobody calls but that are faster for one token: the group packed as
queries of one head (SDPA "packed"), and that as two matmuls and a softmax ("matmul").
Both results are compared before anything is timed.
"""

import torch
import torch.nn.functional as F
from common import DTYPES, arguments, compare, copies_for, paged, peak_flops, report, stream

from kvcache import ops

SHAPES = [  # context, query heads, kv heads, head size
    (8192, 32, 8, 128),
    (32768, 32, 8, 128),
    (8192, 8, 2, 64),
    (32768, 8, 2, 64),
]
COLUMNS = {
    "context": "d", "heads": "s", "dtype": "s", "pages": "s", "ours ms": ".3f", "GB/s": ".1f", "limit GB/s": ".1f",
    "% of limit": ".0f", "SDPA ms": ".3f", "ratio": ".2f", "by hand ms": ".3f", "by hand": "s", "ratio by hand": ".2f",
}  # fmt: skip


def sdpa_ways(q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    packed = q.view(1, k.shape[1], group, -1)
    return {
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True),
        "repeat_kv": lambda: F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale=scale
        ),
        "packed": lambda: F.scaled_dot_product_attention(packed, k, v, scale=scale),
        "matmul": lambda: ((packed @ k.transpose(-1, -2)) * scale).float().softmax(-1).to(v.dtype) @ v,
    }


def measure(context, query_heads, heads, dim, dtype, shuffled, rounds, peak):
    nbytes = 2 * heads * context * dim * dtype.itemsize
    copies = copies_for(nbytes)
    scale = dim**-0.5
    dense = [torch.randn(2, 1, heads, context, dim).to(dtype) for _ in range(copies)]
    q = torch.randn(1, query_heads, dim).to(dtype)
    pages = [paged(k, v, shuffled=shuffled) for k, v in dense]

    def ours(c):
        return ops.decode_attention(q, *pages[c], None, None, None, None, None, None, scale)[0]

    ways = [sdpa_ways(q[:, :, None], k, v, scale) for k, v in dense]
    for way in ways[0].values():
        error = (ours(0).float() - way().reshape(1, query_heads, dim).float()).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
    runs = {"ours": ours, "stream": lambda c: stream(*pages[c][:2])}
    runs |= {name: (lambda c, name=name: ways[c][name]()) for name in ways[0]}
    times = compare(runs, copies, rounds)
    sdpa = min(("enable_gqa", "repeat_kv"), key=times.__getitem__)
    hand = min(("packed", "matmul"), key=times.__getitem__)
    limit = max(times["stream"], 4 * context * dim * query_heads / peak)
    return {
        "context": context, "heads": f"{query_heads}/{heads}x{dim}", "dtype": str(dtype).removeprefix("torch."),
        "pages": "shuffled" if shuffled else "in order", "ours ms": times["ours"] * 1e3,
        "GB/s": nbytes / times["ours"] / 1e9, "limit GB/s": nbytes / limit / 1e9,
        "% of limit": 100 * limit / times["ours"], "SDPA ms": times[sdpa] * 1e3, "ratio": times[sdpa] / times["ours"],
        "by hand ms": times[hand] * 1e3, "by hand": hand, "ratio by hand": times[hand] / times["ours"],
        "all ms": {name: t * 1e3 for name, t in times.items()},
    }  # fmt: skip


def main():
    options = arguments(__doc__)
    peak = peak_flops()
    rows = []
    for shape in SHAPES[::2] if options.quick else SHAPES:
        for name in ("float32", "bfloat16") if options.quick else DTYPES:
            for shuffled in (False, True):
                rounds = 2 if options.quick else 4
                rows.append(measure(*shape, DTYPES[name], shuffled, rounds, peak))
    report(rows, COLUMNS, options)


if __name__ == "__main__":
    main()
