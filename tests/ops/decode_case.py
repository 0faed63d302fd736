"""Calls of decode_attention over storage of known lengths, and plans for them."""

import torch
from paged_case import make_paged

from kvcache import ops
from kvcache.ops import reference

NOTHING = {"window_start": None, "sinks": None, "bias": None, "index": None, "index_counts": None}
HALF = (torch.bfloat16, torch.float16)


def decode(q, case, statistics=None, **changes):
    call = {**NOTHING, "scale": q.shape[-1] ** -0.5, **changes}
    return ops.decode_attention(q, *case.args[:5], statistics=statistics, **call)


def expect(q, case, statistics=None, **changes):
    call = {**NOTHING, "scale": q.shape[-1] ** -0.5, **changes}
    call.pop("plan", None)
    return reference.decode_attention(q.double(), *case.args[:5], statistics=statistics, **call)


def plan(counts, workers, backend, added=0, most=None):
    """The only layer's line of a plan; for kernels that do without, None."""
    if backend in ("reference", "cpu"):
        return None
    most = int(counts.max()) + added if most is None else most
    return ops.plan_decode(counts[None].contiguous(), added, most, workers)[0]


def storage(rows, heads, n, *, k_dim=128, v_dim=None, page_size=16, dtype=torch.bfloat16, seed=0):
    """Every head holds exactly n entries."""
    case = make_paged(
        rows=rows, heads=heads, page_size=page_size, k_dim=k_dim, v_dim=k_dim if v_dim is None else v_dim, dtype=dtype,
        max_count=0, room=n, seed=seed,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, heads, n, d, generator=g) for d in (case.k_pages.shape[2], case.v_pages.shape[2]))
    with ops.use_backend("native"):
        ops.append(*case.args, k, v, torch.arange(n, dtype=torch.int32).repeat(rows, 1))
    return case


def query(case, group, dtype=None, seed=1, size=1.0):
    rows, heads, _ = case.table.shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads * group, case.k_pages.shape[2], generator=g) * size
    return q.to(case.k_pages.dtype if dtype is None else dtype)
