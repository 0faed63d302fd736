"""Absorbed latent attention (MLA), one query per row, against the same in torch and against expanding every entry.

    python bench/kernels/latent_attention.py [options: bench/kernels/common.py]

Sizes of DeepSeek: latents of 512, rotary keys of 64, heads of 128 (and 64) in both directions. Pages of 16 entries lie
in random order; torch reads contiguous latents. "torch" is the absorbed form as two products and a softmax. A "step" is
all that a model computes between its queries and its output: absorbed, both halves of the up-projection around the op;
expanded, the up-projection of every entry and SDPA, which is what transformers does.
"""

import torch
from common import DTYPES, Pages, main, name_of
from devices import Bench

from kvcache import ops

LATENT, ROPE, NOPE, VALUE, PAGE = 512, 64, 128, 128, 16


def shapes(bench: Bench) -> list[tuple]:
    """rows, context, query heads, dtype"""
    if bench.kind == "emulated":
        return [(2, 160, 8, "bfloat16")]
    if bench.kind == "cpu":
        some = [(1, 4096, 16), (1, 16384, 16), (1, 4096, 128)]
        kinds = ("float32", "bfloat16")
        return [(*shape, kind) for shape in (some[:1] if bench.options.quick else some) for kind in kinds]
    some = [(1, 4096, 16), (1, 32768, 16), (1, 4096, 128), (1, 32768, 128), (32, 4096, 128), (8, 32768, 16)]
    return [(*shape, "bfloat16") for shape in (some[:2] if bench.options.quick else some)]


def latents_of(bench: Bench, rows: int, n: int, dtype: torch.dtype) -> Pages:
    count = rows * n // PAGE
    order = torch.randperm(count, device=bench.device).int()
    return Pages(
        bench.randn(count, PAGE, LATENT, dtype=dtype), bench.randn(count, PAGE, ROPE, dtype=dtype),
        order.view(rows, 1, -1), torch.full((rows, 1), n, dtype=torch.int32, device=bench.device),
        torch.arange(n, dtype=torch.int32, device=bench.device).repeat(rows, 1, 1),
        torch.arange(count, dtype=torch.int32, device=bench.device).view(rows, 1, -1),
    )  # fmt: skip


def measure(bench, rows, context, heads, kind):
    dtype, scale = DTYPES[kind], (NOPE + ROPE) ** -0.5
    nbytes = rows * context * (LATENT + ROPE) * dtype.itemsize
    cells = {"rows": rows, "context": context, "heads": heads, "dtype": name_of(dtype)}
    if not bench.fits(nbytes + rows * context * heads * (2 * NOPE + ROPE + 2 * VALUE) * dtype.itemsize):
        print(f"does not fit this device: {cells}")
        return []
    copies = bench.copies(nbytes)
    pages = [latents_of(bench, rows, context, dtype) for _ in range(copies)]
    q = bench.randn(rows, heads, 1, NOPE + ROPE, dtype=dtype)
    weight = bench.randn(heads, NOPE + VALUE, LATENT, dtype=dtype) * LATENT**-0.5
    q_latent, q_rope = bench.randn(rows, heads, 1, LATENT, dtype=dtype), q[..., NOPE:]
    statistics = torch.zeros(rows, 1, context, device=bench.device)
    plan = None if bench.kind == "cpu" else ops.plan_decode(pages[0].counts[None], 0, context)[0]

    def call(c, latent=q_latent, statistics=None):
        return ops.latent_attention(latent, q_rope, *pages[c].args(), None, None, statistics, scale, plan=plan)[0]

    def step(c):
        latent = (q[:, :, 0, :NOPE].transpose(0, 1) @ weight[:, :NOPE]).transpose(0, 1)[:, :, None]
        return call(c, latent)[:, 0].transpose(0, 1) @ weight[:, NOPE:].transpose(1, 2)

    def dense(c):
        return (x.view(rows, context, -1) for x in (pages[c].k, pages[c].v))

    def by_torch(c):
        latents, ropes = dense(c)
        logits = q_latent[:, :, 0] @ latents.transpose(1, 2) + q_rope[:, :, 0] @ ropes.transpose(1, 2)
        return (logits * scale).softmax(-1) @ latents

    def expanded(c):
        latents, ropes = dense(c)
        both = (latents @ weight.flatten(0, 1).T).view(rows, context, heads, -1).transpose(1, 2)
        keys = both.new_empty(rows, heads, context, NOPE + ROPE)
        keys[..., :NOPE], keys[..., NOPE:] = both[..., :NOPE], ropes[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, both[..., NOPE:], scale=scale)

    runs = {
        "ours": call, "ours, statistics": lambda c: call(c, statistics=statistics), "ours, step": step,
        "torch|absorbed": by_torch,
    }  # fmt: skip
    if bench.kind != "cpu" or (context, heads) == (4096, 16):  # a CPU takes seconds for a larger one
        runs["expanded"] = expanded
    times = bench.compare(runs, copies, pools=lambda c: (pages[c].k, pages[c].v))
    flops = 2 * rows * heads * context * (2 * LATENT + ROPE)
    row = bench.row(cells, times, nbytes=nbytes, flops=flops, peers=["torch"])
    mine, theirs = times.seconds["ours, step"], times.seconds.get("expanded")
    timed = isinstance(mine, float) and isinstance(theirs, float)
    row[f"step {bench.time_unit}"], row[f"expanded {bench.time_unit}"] = bench.shown(mine), bench.shown(theirs)
    row["ratio of steps"] = theirs / mine if timed else None
    plain, counted = times.seconds["ours"], times.seconds["ours, statistics"]
    row["statistics +%"] = 100 * (counted / plain - 1) if plain and counted else None
    return [row]


if __name__ == "__main__":
    main(__doc__, shapes, measure)
