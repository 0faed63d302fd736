"""Attention column sums (H2O's score of a prompt) against the eager way: softmax(q k^T) as a whole, then the sum.

    python bench/kernels/column_sums.py [--out FILE.json] [--threads 1] [--cpu N] [--quick]

Eager attention has to keep heads x T x T probabilities; ours needs memory linear in T. Flops: the visible half of one
product, 2 * T^2 / 2 * D per head. The log-sum-exp that ours starts from is a by-product of prefill_attention.
"last 64" is SnapKV's observation window.
"""

import torch
from common import DTYPES, arguments, compare, paged, peak_flops, report

from kvcache import ops

SHAPES = [(1024, 32, 8, 128, 0), (2048, 32, 8, 128, 0), (2048, 8, 2, 64, 0), (4096, 32, 8, 128, 64)]
COLUMNS = {
    "tokens": "d", "last": "d", "heads": "s", "dtype": "s", "ours ms": ".2f", "GFLOP/s": ".0f", "peak GFLOP/s": ".0f",
    "% of limit": ".0f", "eager ms": ".2f", "ratio": ".2f",
}  # fmt: skip


def measure(tokens, query_heads, heads, dim, last, dtype, rounds, peak):
    scale = dim**-0.5
    k = torch.randn(1, heads, tokens, dim).to(dtype)
    q = torch.randn(1, query_heads, tokens, dim).to(dtype)
    k_pages, v_pages, *tables = paged(k, k, shuffled=True)
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    group = query_heads // heads
    _, lse = ops.prefill_attention(q, k_pages, v_pages, *tables, positions, None, None, None, None, None, None, scale)

    def ours(_):
        return ops.column_sums(q, k_pages, *tables, positions, lse, None, None, None, scale, last=last)

    def eager(_):
        recent = q[:, :, -last:] if last else q
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[-recent.shape[2] :]
        logits = (recent @ k.repeat_interleave(group, 1).transpose(-1, -2)) * scale
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
        return weights.sum(2).view(1, heads, group, tokens).mean(2)

    torch.testing.assert_close(ours(0), eager(0), rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-3)
    times = compare({"ours": ours, "eager": eager}, 1, rounds)
    rows = last or tokens
    flops = 2 * rows * (tokens - rows / 2) * dim * query_heads
    return {
        "tokens": tokens, "last": last, "heads": f"{query_heads}/{heads}x{dim}",
        "dtype": str(dtype).removeprefix("torch."), "ours ms": times["ours"] * 1e3,
        "GFLOP/s": flops / times["ours"] / 1e9, "peak GFLOP/s": peak / 1e9,
        "% of limit": 100 * flops / peak / times["ours"], "eager ms": times["eager"] * 1e3,
        "ratio": times["eager"] / times["ours"],
    }  # fmt: skip


def main():
    options = arguments(__doc__)
    rows = []
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for name in ("float32", "bfloat16"):
            rows.append(measure(*shape, DTYPES[name], 3 if options.quick else 5, peak_flops()))
    report(rows, COLUMNS, options)


if __name__ == "__main__":
    main()
