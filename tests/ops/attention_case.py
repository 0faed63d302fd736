"""Random calls of the attention ops, and how exactly their results must match the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from paged_case import STORAGE_DTYPES, Paged, make_paged, strided
from torch import Tensor

NEG_INF = float("-inf")
DIMS = (1, 2, 7, 16, 31, 32, 33, 64, 80, 96, 128, 200, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 13)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def ints(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def calls(draw, same_entries: bool = False):
    """(case, query heads, generator, draw): storage with ragged counts and a seeded generator for the rest."""
    max_count = draw(st.sampled_from((0, 1, 17, 63, 64, 65, 100, 200, 300)))
    page_size = draw(st.sampled_from((1, 3, 16, 64)))
    k_dim = draw(st.sampled_from(DIMS))
    case = make_paged(
        rows=draw(st.integers(1, 3)), heads=draw(st.integers(1, 3)), page_size=page_size, k_dim=k_dim,
        v_dim=draw(st.sampled_from((k_dim, *DIMS))), dtype=draw(st.sampled_from(STORAGE_DTYPES)), max_count=max_count,
        room=draw(st.sampled_from((0, 0, 70))), same_counts=same_entries, seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip
    if same_entries:
        case.positions[:] = case.positions[:, :1]
    elif draw(st.booleans()):  # in order, as a fresh prompt leaves it: kernels take whole tiles without looking
        slots = torch.arange(case.positions.shape[2], dtype=torch.int32).expand_as(case.positions)
        case.positions.copy_(torch.where(slots < case.counts[..., None], slots, case.positions))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return case, case.table.shape[1] * draw(st.sampled_from(GROUPS)), g


def options(data, case: Paged, query_heads: int, g: torch.Generator) -> dict:
    """Arguments that prefill and decode share."""
    rows, heads, capacity = case.positions.shape
    out: dict = {"sinks": None, "bias": None, "index": None, "index_counts": None}
    if data.draw(st.booleans(), "sinks"):
        out["sinks"] = 3 * torch.randn(query_heads, generator=g)
    if data.draw(st.booleans(), "bias"):
        lines = data.draw(st.sampled_from((1, heads, query_heads)), "bias heads")
        bias = torch.randn(rows, lines, capacity, generator=g)
        bias[torch.rand(bias.shape, generator=g) < data.draw(st.sampled_from((0.0, 0.3, 1.0)), "hidden")] = NEG_INF
        out["bias"] = bias - data.draw(st.sampled_from((0.0, 1e5)), "below the range of float16")
    if data.draw(st.booleans(), "index"):
        lines = data.draw(st.sampled_from((1, heads)), "index heads")
        room = case.counts if lines == heads else case.counts.amax(1, keepdim=True)
        width = int(room.max()) + 1
        out["index"] = torch.full((rows, lines, width), -1, dtype=torch.int32)
        out["index_counts"] = torch.zeros(rows, lines, dtype=torch.int32)
        for r in range(rows):
            for h in range(lines):
                slots = torch.randperm(int(room[r, h]), generator=g)
                slots = slots[: len(slots) * data.draw(st.sampled_from((0, 1, 3)), "share") // 3]
                if data.draw(st.booleans(), "ascending"):
                    slots = slots.sort().values
                out["index"][r, h, : len(slots)] = slots.int()
                out["index_counts"][r, h] = len(slots)
    out["scale"] = data.draw(st.sampled_from((1.0, case.k_pages.shape[2] ** -0.5, 0.3)), "scale")
    out["softcap"] = data.draw(st.sampled_from((0.0, 0.0, 20.0)), "softcap")
    return out


def queries(data, case: Paged, query_heads: int, tokens: int, g: torch.Generator) -> Tensor:
    q = torch.randn(case.table.shape[0], query_heads, tokens, case.k_pages.shape[2], generator=g)
    q = (q * data.draw(st.sampled_from((1.0, 30.0)), "size")).to(data.draw(st.sampled_from(STORAGE_DTYPES), "q"))
    return strided(q) if data.draw(st.booleans(), "strided") else q


def logit_error(q: Tensor, case: Paged, call: dict) -> float:
    """Bound of a logit's error in float32: its terms' size, which the softmax turns into a relative error."""
    dim = q.shape[-1]
    size = 4.0 * dim**0.5 * call["scale"] * float(q.float().abs().max()) if q.numel() else 0.0
    if call.get("softcap"):
        size = min(size, 4 * call["softcap"])
    bias = call.get("bias")
    if bias is not None and bias.isfinite().any():
        size += float(bias[bias.isfinite()].abs().max())
    return 2e-5 + 4e-7 * size


def statistics_error(error: float, case: Paged, backend: str) -> float:
    """Of decode's probabilities, given that of a logit: the tensor-core kernels keep them in 16 bits until the end."""
    half = backend in ("emulated", "cuda") and case.k_pages.dtype != torch.float32
    return error + (2.0**-11 if half else 0.0)


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(
        got.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def assert_attention(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], q: Tensor, error: float) -> None:
    assert got[0].dtype == q.dtype
    assert got[1].dtype == torch.float32
    assert_close(got[1], want[1], error, "lse")
    assert_close(got[0], want[0], error + ROUNDING[q.dtype], "out")
