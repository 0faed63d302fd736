"""How exact the ops are that multiply: at most twice the error of torch run in the same dtype, both against float64.

Decode attention's outputs and statistics: test_decode_attention.py::test_error_is_that_of_torch. What is fuzzed is held
to bounds of its own (attention_case.py, tensor_core_case.py).
"""

import pytest
import torch
from decode_case import HALF, storage
from paged_case import make_paged
from tensor_core_case import same_dtype
from torch import Tensor

from kvcache import ops
from kvcache.ops import reference

DTYPES = (torch.float32, *HALF)
SHAPES = [(64, 8, 700), (128, 4, 1500), (80, 1, 400), (256, 2, 300)]  # head size, group, entries
FLOOR = 1e-6  # of the largest result: sums in float32 in another order
OF_LOGITS = 1e-7  # what an exponential makes of a logit's last bit, per unit of the logit

shaped = pytest.mark.parametrize(("dim", "group", "n"), SHAPES)
typed = pytest.mark.parametrize("dtype", DTYPES)


def queries(case, group: int, tokens: int, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    rows, heads, _ = case.table.shape
    q = torch.randn(rows, heads * group, tokens, case.k_pages.shape[2], generator=g)
    return (2 * q).to(case.k_pages.dtype)


def dense(case) -> tuple[Tensor, Tensor]:
    n = int(case.counts.max())
    return tuple(reference.gather_pages(x, case.table, case.counts, n) for x in (case.k_pages, case.v_pages))


def assert_within_twice(got: Tensor, theirs: Tensor, want: Tensor, logits: Tensor | None = None) -> None:
    """``logits``: whose exponentials are in the result."""
    floor = FLOOR + (0 if logits is None else OF_LOGITS * float(logits.abs().max()))
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    got, theirs, want = (x.double()[finite] for x in (got, theirs, want))
    mine, allowed = (got - want).abs().max(), 2 * (theirs - want).abs().max() + floor * want.abs().max()
    assert mine <= allowed, f"error {float(mine):.3g}, twice that of torch is {float(allowed):.3g}"


@typed
@shaped
def test_prefill_attention(backend, dtype, dim, group, n):
    case, tokens = storage(1, 2, n, k_dim=dim, dtype=dtype, seed=dim), 21
    case.positions[..., :n] = torch.arange(n)
    q, q_positions = queries(case, group, tokens), torch.arange(n - tokens, n).int()[None]
    call = {**dict.fromkeys(("window_start", "sinks", "bias", "mask", "index", "index_counts"))}
    call |= {"scale": dim**-0.5, "softcap": 0.0}
    got, lse = ops.prefill_attention(q, *case.args[:5], q_positions, **call)
    want, want_lse = reference.prefill_attention(q.double(), *case.args[:5], q_positions, **call)
    assert_within_twice(got, same_dtype(q, case, q_positions, call), want)
    logits = (q.view(1, 2, group, tokens, dim) @ dense(case)[0][:, :, None].transpose(-1, -2)) * dim**-0.5
    hidden = torch.arange(n) > q_positions[0][:, None]
    assert_within_twice(lse, logits.masked_fill(hidden, float("-inf")).logsumexp(-1).flatten(1, 2), want_lse)


@typed
@shaped
@pytest.mark.parametrize("last", [0, 5])
def test_column_sums(backend, dtype, dim, group, n, last):
    case, tokens = storage(1, 2, n, k_dim=dim, dtype=dtype, seed=dim + 1), 21
    case.positions[..., :n] = torch.arange(n)
    q, q_positions = queries(case, group, tokens), torch.arange(n - tokens, n).int()[None]
    nothing = (None, None, None, None, None, None)
    _, lse = reference.prefill_attention(q.double(), *case.args[:5], q_positions, *nothing, dim**-0.5)
    keys = (case.k_pages, *case.args[2:5], q_positions, lse.float(), None, None, None, dim**-0.5)
    got = ops.column_sums(q, *keys, last=last)[..., :n]
    want = reference.column_sums(q.double(), *keys, last=last)[..., :n]
    logits = (q.view(1, 2, group, tokens, dim) @ dense(case)[0][:, :, None].transpose(-1, -2)) * dim**-0.5
    p = (logits - lse.view(1, 2, group, tokens, 1).to(dtype)).exp()
    p = p.masked_fill(torch.arange(n) > q_positions[0][:, None], 0)
    assert_within_twice(got, p[..., -last or None :, :].mean(2).sum(2), want, logits)


@typed
@shaped
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_selection_scores(backend, dtype, dim, group, n, soft, per_head):
    case = storage(1, 2, n, k_dim=dim, dtype=dtype, seed=dim + 2)
    case.positions[..., :n] = torch.arange(n)
    q, (first, end) = queries(case, group, 1)[:, :, 0], torch.tensor([[4], [n - 9]], dtype=torch.int32)
    keys = (case.k_pages, *case.args[2:5], first, end, dim**-0.5, soft, per_head)
    got, want = ops.selection_scores(q, *keys), reference.selection_scores(q.double(), *keys)
    logits = (q.view(1, 2, group, dim) @ dense(case)[0].transpose(-1, -2)) * dim**-0.5
    guarded = (torch.arange(n) < 4) | (torch.arange(n) >= n - 9)
    votes = logits.masked_fill(guarded, float("-inf")).softmax(-1) if soft else logits
    theirs = (votes.sum(2) if per_head else votes.sum((1, 2))[:, None]).masked_fill(guarded, float("-inf"))
    assert_within_twice(got[..., :n], theirs, want[..., :n], logits if soft else None)


@typed
@shaped
@pytest.mark.parametrize("soft", [True, False])
def test_page_scores(backend, dtype, dim, group, n, soft):
    case = storage(1, 2, n, k_dim=dim, dtype=dtype, seed=dim + 3)
    case.positions[..., :n] = torch.arange(n)
    bounds = torch.zeros(len(case.k_pages), 2, dim, dtype=dtype)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    q, (first, end) = queries(case, group, 1)[:, :, 0], torch.tensor([[0], [n]], dtype=torch.int32)
    keys = (bounds, *case.args[2:5], first, end, dim**-0.5, soft, True)
    got, want = ops.page_scores(q, *keys), reference.page_scores(q.double(), *keys)
    low, high = bounds[case.table.long()].unbind(3)
    grouped = q.view(1, 2, group, 1, dim)
    logits = torch.maximum(grouped * low[:, :, None], grouped * high[:, :, None]).sum(-1) * dim**-0.5
    assert_within_twice(got, (logits.softmax(-1) if soft else logits).sum(2), want, logits if soft else None)


@typed
def test_query_similarity(backend, dtype):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, 128, generator=g).to(dtype)
    b = (a.float() + 0.3 * torch.randn(a.shape, generator=g)).to(dtype)
    want = torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1, eps=1e-8)
    assert_within_twice(ops.query_similarity(a, b), torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1), want)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 65_535, 65_536, 65_537])
@pytest.mark.parametrize("group", [1, 4])
def test_one_length_through_all_ops(fast_backend, n, group):
    """A step over heads that hold n entries: nothing, one, a page but one, ... 65k; the pool beside them is NaN."""
    case = make_paged(
        rows=1, heads=1, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=0, room=n + 2, seed=n
    )
    g = torch.Generator().manual_seed(n)
    k, v = (torch.randn(1, 1, n, 64, generator=g).bfloat16() for _ in range(2))
    bounds = torch.full((len(case.k_pages), 2, 64), float("nan"), dtype=torch.bfloat16)
    ops.append(*case.args, k, v, torch.arange(n).int()[None], None, bounds)
    assert case.counts.item() == n
    q = torch.randn(1, group, 64, generator=g).bfloat16()
    logits = (q.double() @ k[0, 0].double().T) * 0.125
    nothing = (None, None, None, None, None)
    statistics = torch.zeros(case.positions.shape)
    out, lse = ops.decode_attention(q, *case.args[:5], *nothing, statistics, 0.125)
    few, few_lse = ops.prefill_attention(
        q[:, :, None], *case.args[:5], torch.tensor([[n]], dtype=torch.int32), None, *nothing, 0.125
    )
    for got, its_lse in ((out, lse), (few[:, 0], few_lse[..., 0])):
        torch.testing.assert_close(its_lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            got.double(), logits.softmax(-1) @ v[0, 0].double(), rtol=2.0**-8, atol=2.0**-8
        )  # weights have 8 bits
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(statistics[0, 0, :n].double(), p.mean(0), rtol=2.0**-9, atol=1e-9)
    keys = (case.k_pages, *case.args[2:5])
    last = torch.tensor([[n]], dtype=torch.int32)
    sums = ops.column_sums(q[:, :, None], *keys, last, lse[..., None], None, None, None, 0.125)
    torch.testing.assert_close(sums[0, 0, :n].double(), p.mean(0), rtol=1e-4, atol=1e-9)
    zero, end = torch.zeros(1, dtype=torch.int32), torch.full((1,), n, dtype=torch.int32)
    scores = ops.selection_scores(q, *keys, zero, end, 0.125)
    torch.testing.assert_close(scores[0, 0, :n].double(), p.sum(0), rtol=1e-4, atol=1e-9)
    assert scores[0, 0, n:].eq(float("-inf")).all()
    pages = ops.page_scores(q, bounds, *case.args[2:5], zero, end, 0.125)
    assert pages.shape == case.table[:, :1].shape
    assert pages[0, 0, : -(-n // 16)].isfinite().all()
    best = torch.tensor([[min(n, 100)]], dtype=torch.int32)
    index, counts = ops.topk(scores, case.counts, case.positions, best, zero, end, 100)
    assert counts.item() == min(n, 100)
    assert set(index[0, 0, : counts.item()].tolist()) == set(scores[0, 0, :n].topk(min(n, 100)).indices.tolist())
    victim = ops.choose_victims(scores, case.counts, case.positions, case.counts - 1, zero, end)
    assert victim.item() == (scores[0, 0, :n].argmin().item() if n else -1)
    ops.overwrite(*case.args, victim, bounds)
    assert case.counts.item() == max(n - 1, 0)
    if n > 1:
        held = reference.gather_pages(case.k_pages, case.table, case.counts)[0, 0]
        assert torch.equal(held[victim.item()], k[0, 0, -1] if victim.item() < n - 1 else held[victim.item()])
