"""Random calls of prefill_attention and column_sums that reach the tensor-core kernels, and how exact those must be.

They multiply 16-bit storage with 16-bit weights, as torch's flash attention does, so their output is held to the error
of a same-dtype torch computation: at most twice as far from the float64 reference, per call. Log-sum-exps and column
sums never leave float32 and are held to its precision.
"""

from __future__ import annotations

import pytest
import torch
from attention_case import assert_close, logit_error
from hypothesis import strategies as st
from paged_case import Paged, make_paged, strided
from support import emulation
from torch import Tensor

from kvcache.ops import reference

NEG_INF = float("-inf")
DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
MULTIPROCESSORS = (1, 12, 40, 400)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def multiprocessors(backend, request):
    """Sets how many multiprocessors an emulated GPU pretends to have: it decides the tiles and how work is split.

    A test with the parameter ``count`` runs with the smallest alone where there are none.
    """
    if backend in ("reference", "cpu") and request.node.callspec.params.get("count", 1) > 1:
        pytest.skip("no multiprocessors to share the work")
    if backend != "emulated":
        yield lambda count: None
        return
    library = emulation.library()
    yield library.kvcache_emulated_multiprocessors
    library.kvcache_emulated_multiprocessors(12)


@st.composite
def calls(draw):
    """(storage, q, q_positions, the other arguments of prefill_attention) with heads the tensor cores can take."""
    k_dim = draw(st.sampled_from(DIMS))
    v_dim = draw(st.sampled_from((k_dim, k_dim, *DIMS)))
    dtype = draw(st.sampled_from(HALF))
    page_size = draw(st.sampled_from((1, 3, 16, 64)))
    edges = (page_size - 1, page_size, page_size + 1)
    max_count = draw(st.sampled_from((0, 1, 17, *edges, 63, 64, 65, 130, 400, 700)))
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**20))
    case = make_paged(
        rows=rows, heads=heads, page_size=page_size, k_dim=k_dim, v_dim=v_dim, dtype=dtype, max_count=max_count,
        room=draw(st.sampled_from((0, 0, 70))), seed=seed,
    )  # fmt: skip
    capacity = case.positions.shape[2]
    if draw(st.booleans()):  # in order, as a fresh prompt leaves it
        slots = torch.arange(capacity, dtype=torch.int32).expand_as(case.positions)
        case.positions.copy_(torch.where(slots < case.counts[..., None], slots, case.positions))
    group = draw(st.sampled_from(GROUPS))
    tokens = draw(st.sampled_from((1, 2, 4, 5, 16, 33, 70, 200)))
    if tokens * group > 600:
        group = 3
    query_heads = heads * group
    g = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(rows, query_heads, tokens, k_dim, generator=g) * draw(st.sampled_from((1.0, 6.0)))
    q = q.to(dtype)
    if draw(st.booleans()):
        q = strided(q)
    q_positions = draw_positions(draw, rows, tokens, capacity, g)
    q.masked_fill_((q_positions < 0)[:, None, :, None], float("nan"))  # padding holds anything
    call = {
        "scale": draw(st.sampled_from((k_dim**-0.5, 0.3, -0.2, 0.0))),
        "softcap": draw(st.sampled_from((0.0, 0.0, 20.0))),
    }
    call |= draw_options(draw, case, query_heads, q_positions, g)
    return case, q, q_positions, call


def draw_positions(draw, rows: int, tokens: int, capacity: int, g: torch.Generator) -> Tensor:
    kind = draw(st.sampled_from(("scattered", "padded left", "padded right", "plain")))
    if kind == "scattered":
        return torch.randint(-1, 2 * capacity + 2, (rows, tokens), generator=g, dtype=torch.int32)
    q_positions = (torch.arange(tokens) + max(0, capacity - tokens)).int().repeat(rows, 1)
    if kind == "padded left":
        q_positions[0, : tokens // 3] = -1
    elif kind == "padded right":
        q_positions[-1, tokens - tokens // 2 :] = -1
    return q_positions


def draw_options(draw, case: Paged, query_heads: int, q_positions: Tensor, g: torch.Generator) -> dict:
    rows, heads, capacity = case.positions.shape
    tokens = q_positions.shape[1]
    out: dict = dict.fromkeys(("window_start", "sinks", "bias", "mask", "index", "index_counts"))
    if draw(st.booleans()):
        return out
    if draw(st.booleans()):
        out["window_start"] = q_positions - draw(st.sampled_from((0, 1, 20, capacity // 2, 2 * capacity + 2)))
    if draw(st.booleans()):
        out["sinks"] = 3 * torch.randn(query_heads, generator=g)
    if draw(st.booleans()):
        bias = torch.randn(rows, draw(st.sampled_from((1, heads, query_heads))), capacity, generator=g)
        bias[torch.rand(bias.shape, generator=g) < draw(st.sampled_from((0.0, 0.3)))] = NEG_INF
        if draw(st.booleans()):
            bias[0] = NEG_INF  # hides a whole row
        out["bias"] = bias - draw(st.sampled_from((0.0, 1e5)))
    if draw(st.booleans()):
        share = draw(st.sampled_from((0.02, 0.7)))
        lines = draw(st.sampled_from((1, heads)))
        out["mask"] = torch.rand(rows, lines, tokens, capacity, generator=g) < share
    if draw(st.booleans()):
        out["index"], out["index_counts"] = draw_index(draw, case, g)
    return out


def draw_index(draw, case: Paged, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, heads, _ = case.positions.shape
    lines = draw(st.sampled_from((1, heads)))
    room = case.counts if lines == heads else case.counts.amax(1, keepdim=True)
    index = torch.full((rows, lines, int(room.max()) + 1), -1, dtype=torch.int32)
    counts = torch.zeros(rows, lines, dtype=torch.int32)
    share = draw(st.sampled_from((0.0, 0.4, 1.0)))
    for r in range(rows):
        for h in range(lines):
            slots = torch.randperm(int(room[r, h]), generator=g)
            slots = slots[: int(len(slots) * share)].sort().values
            index[r, h, : len(slots)] = slots.int()
            counts[r, h] = len(slots)
    return index, counts


def same_dtype(q: Tensor, case: Paged, q_positions: Tensor, call: dict) -> Tensor:
    """The output as torch computes it when every tensor has q's dtype, [R, T, Hq, Dv]."""
    rows, query_heads, tokens, dim = q.shape
    heads = case.counts.shape[1]
    width = int(case.counts.max()) if case.counts.numel() else 0
    k, v = (reference.gather_pages(x, case.table, case.counts, width)[:, :, None] for x in (case.k_pages, case.v_pages))
    q = q.masked_fill((q_positions < 0)[:, None, :, None], 0)
    logits = (q.reshape(rows, heads, -1, tokens, dim) @ k.transpose(-1, -2)).float() * call["scale"]
    if call["softcap"] > 0:
        logits = torch.tanh(logits / call["softcap"]) * call["softcap"]
    if call["bias"] is not None:
        logits = logits + reference._per_group(call["bias"], rows, heads, query_heads // heads)[..., None, :width]
    hidden = ("window_start", "mask", "index", "index_counts")
    seen = reference._visible(case.counts, case.positions, q_positions, *(call[x] for x in hidden), width)[:, :, None]
    logits = logits.masked_fill(~seen, NEG_INF)
    if call["sinks"] is not None:
        logits = torch.cat([logits, call["sinks"].view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., :width].to(q.dtype)
    out = (weights @ v).reshape(rows, query_heads, tokens, -1)
    return out.transpose(1, 2)


def assert_as_exact_as_torch(
    got: tuple[Tensor, Tensor], case: Paged, q: Tensor, q_positions: Tensor, call: dict
) -> None:
    want_out, want_lse = reference.prefill_attention(
        q.masked_fill((q_positions < 0)[:, None, :, None], 0).double(), *case.args[:5], q_positions, **call
    )
    assert got[0].dtype == q.dtype
    assert got[1].dtype == torch.float32
    real = q.masked_fill((q_positions < 0)[:, None, :, None], 0)
    of_logits = logit_error(real, case, call | {"scale": abs(call["scale"])})
    assert_close(got[1], want_lse, of_logits, "lse")
    nothing = (want_lse == NEG_INF).transpose(1, 2)
    assert (got[0][nothing] == 0).all()
    values = reference.gather_pages(case.v_pages, case.table, case.counts).abs()
    if not got[0].numel() or not values.numel():
        return
    theirs = (same_dtype(q, case, q_positions, call).double() - want_out).abs().max()
    mine = (got[0].double() - want_out).abs().max()
    # Two largest errors of a few numbers are a matter of luck: there, once the rounding of the largest value on top.
    luck = torch.finfo(q.dtype).eps / 2 * float(values.max()) if got[0].numel() < 10_000 else 1e-4
    assert mine <= 2 * theirs + luck + of_logits, (
        f"error {float(mine):.3g}, that of torch in {q.dtype} is {float(theirs):.3g}"
    )
