"""Paged prefill attention of a causal prompt against torch's scaled_dot_product_attention.

    python bench/kernels/prefill_attention.py [--out FILE.json] [--threads 1] [--cpu N] [--quick]

Flops are those of the visible half of the scores, 2 products of 2 * T^2 / 2 * D per head; what a kernel spends on the
hidden half counts against it. On processors with AMX, torch multiplies bfloat16 in it, which is faster than the
float32 peak that is the limit here.
"""

import torch
import torch.nn.functional as F
from common import DTYPES, arguments, compare, paged, peak_flops, report

from kvcache import ops

SHAPES = [  # tokens, query heads, kv heads, head size
    (512, 32, 8, 128),
    (2048, 32, 8, 128),
    (4096, 8, 2, 64),
    (2048, 8, 8, 128),
]
COLUMNS = {
    "tokens": "d", "heads": "s", "dtype": "s", "ours ms": ".1f", "GFLOP/s": ".0f", "peak GFLOP/s": ".0f",
    "% of limit": ".0f", "SDPA ms": ".1f", "SDPA way": "s", "ratio": ".2f",
}  # fmt: skip


def measure(tokens, query_heads, heads, dim, dtype, rounds, peak):
    scale = dim**-0.5
    k, v = torch.randn(2, 1, heads, tokens, dim).to(dtype)
    q = torch.randn(1, query_heads, tokens, dim).to(dtype)
    pages = paged(k, v, shuffled=True)
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    group = query_heads // heads

    def ours(_):
        return ops.prefill_attention(q, *pages, positions, None, None, None, None, None, None, scale)[0]

    def enable_gqa(_):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def repeat_kv(_):
        wide = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, *wide, is_causal=True, scale=scale)

    error = (ours(0).transpose(1, 2).float() - enable_gqa(0).float()).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 4e-2), error
    times = compare({"ours": ours, "enable_gqa": enable_gqa, "repeat_kv": repeat_kv}, 1, rounds)
    best = min(("enable_gqa", "repeat_kv"), key=times.__getitem__)
    flops = 2 * tokens * tokens * dim * query_heads
    return {
        "tokens": tokens, "heads": f"{query_heads}/{heads}x{dim}", "dtype": str(dtype).removeprefix("torch."),
        "ours ms": times["ours"] * 1e3, "GFLOP/s": flops / times["ours"] / 1e9, "peak GFLOP/s": peak / 1e9,
        "% of limit": 100 * flops / peak / times["ours"], "SDPA ms": times[best] * 1e3, "SDPA way": best,
        "ratio": times[best] / times["ours"], "all ms": {name: t * 1e3 for name, t in times.items()},
    }  # fmt: skip


def main():
    options = arguments(__doc__)
    rows = []
    for shape in SHAPES[:2] if options.quick else SHAPES:
        for name in ("float32", "bfloat16") if options.quick else DTYPES:
            rows.append(measure(*shape, DTYPES[name], 3 if options.quick else 7, peak_flops()))
    report(rows, COLUMNS, options)


if __name__ == "__main__":
    main()
