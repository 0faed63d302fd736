"""Token selection for sparse decode (TokenSelect): scores of all entries, the top k of them, attention over those.

    python bench/kernels/selection.py [--out FILE.json] [--threads 1] [--cpu N] [--quick]

The baseline is the same in torch on contiguous keys: packed matmul, softmax, sum over the heads; torch.topk; a gather
of keys and values, then SDPA. The limit of the scores is one pass over the keys. Pages are shuffled.
"""

import torch
import torch.nn.functional as F
from common import DTYPES, arguments, compare, copies_for, paged, report, stream

from kvcache import ops

SHAPES = [(8192, 32, 8, 128, 1024), (32768, 32, 8, 128, 2048), (32768, 8, 2, 64, 2048)]
COLUMNS = {
    "context": "d", "k": "d", "heads": "s", "dtype": "s", "op": "s", "ours ms": ".3f", "GB/s": ".1f",
    "limit GB/s": ".1f", "% of limit": ".0f", "torch ms": ".3f", "ratio": ".2f",
}  # fmt: skip


def measure(context, query_heads, heads, dim, k_best, dtype, rounds):
    nbytes = heads * context * dim * dtype.itemsize
    copies = copies_for(2 * nbytes)
    scale, group = dim**-0.5, query_heads // heads
    dense = [torch.randn(2, 1, heads, context, dim).to(dtype) for _ in range(copies)]
    pages = [paged(k, v, shuffled=True) for k, v in dense]
    q = torch.randn(1, query_heads, dim).to(dtype)
    first, end = (torch.tensor([x], dtype=torch.int32) for x in (0, context))
    kept = torch.full((1, heads), k_best, dtype=torch.int32)

    def scores(c):
        k_pages, _, *tables = pages[c]
        return ops.selection_scores(q, k_pages, *tables, first, end, scale)

    def torch_scores(c):
        logits = (q.view(1, heads, group, dim) @ dense[c][0].transpose(-1, -2)).float() * scale
        return logits.softmax(-1).sum((1, 2), keepdim=True)[:, 0]

    mine, theirs = [scores(c) for c in range(copies)], [torch_scores(c) for c in range(copies)]
    torch.testing.assert_close(mine[0], theirs[0], rtol=2e-2, atol=1e-3)

    def choose(c):
        _, _, _, counts, positions = pages[c]
        return ops.topk(mine[c], counts[:, :1], positions[:, :1], kept[:, :1], first, end, k_best)

    def torch_choose(c):
        return theirs[c].topk(k_best).indices

    chosen, torch_chosen = [choose(c) for c in range(copies)], [torch_choose(c) for c in range(copies)]

    def attend(c):
        return ops.decode_attention(q, *pages[c], None, None, None, *chosen[c], None, scale)[0]

    def torch_attend(c):
        few = dense[c][:, :, :, torch_chosen[c][0, 0]]
        return F.scaled_dot_product_attention(q.view(1, heads, group, dim), *few, scale=scale)

    runs = {"scores": scores, "topk": choose, "attend": attend, "stream": lambda c: stream(pages[c][0])}
    runs |= {"torch scores": torch_scores, "torch topk": torch_choose, "torch attend": torch_attend}
    times = compare(runs, copies, rounds)
    bandwidth = nbytes / times["stream"]
    moved = {"scores": nbytes, "topk": 4 * context, "attend": 2 * heads * k_best * dim * dtype.itemsize}
    return [
        {
            "context": context, "k": k_best, "heads": f"{query_heads}/{heads}x{dim}",
            "dtype": str(dtype).removeprefix("torch."), "op": op, "ours ms": times[op] * 1e3,
            "GB/s": n / times[op] / 1e9, "limit GB/s": bandwidth / 1e9,
            "% of limit": 100 * n / bandwidth / times[op], "torch ms": times[f"torch {op}"] * 1e3,
            "ratio": times[f"torch {op}"] / times[op],
        }
        for op, n in moved.items()
    ]  # fmt: skip


def main():
    options = arguments(__doc__)
    rows = []
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for name in ("float32", "bfloat16"):
            rows += measure(*shape, DTYPES[name], 2 if options.quick else 4)
    report(rows, COLUMNS, options)


if __name__ == "__main__":
    main()
