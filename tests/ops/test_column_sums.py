"""column_sums where the CUDA kernels do something of their own: tensor cores, tiles of queries, pieces of the queries.

What every implementation must do is in test_attention_ops.py.
"""

import pytest
import torch
from attention_case import assert_close, ints, logit_error
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import make_paged, strided
from support.backends import examples
from tensor_core_case import HALF, MULTIPROCESSORS, calls, multiprocessors  # noqa: F401
from test_prefill_attention import prompt

from kvcache import ops
from kvcache.ops import reference

NEG_INF = float("-inf")
NOTHING = {
    "window_start": None,
    "bias": None,
    "mask": None,
    "scale": 0.1,
    "softcap": 0.0,
    "last": 0,
    "reduce_max": False,
}


def logsumexp(q, case, q_positions, call):
    """That of the attention, from the float64 reference; padding queries may hold NaN."""
    real = q.masked_fill((q_positions < 0)[:, None, :, None], 0)
    shared = {name: call[name] for name in ("window_start", "bias", "mask", "scale", "softcap")}
    out = reference.prefill_attention(
        real.double(), *case.args[:5], q_positions, sinks=call.get("sinks"), index=None, index_counts=None, **shared
    )
    return out[1], real


def check(q, case, q_positions, **changes):
    call = NOTHING | changes
    lse, real = logsumexp(q, case, q_positions, call)
    call.pop("sinks", None)
    keys = (case.k_pages, *case.args[2:5])
    got = ops.column_sums(q, *keys, q_positions, lse, **call)
    want = reference.column_sums(real.double(), *keys, q_positions, lse, **call)
    error = 2 * logit_error(real, case, call | {"scale": abs(call["scale"])})
    assert_close(got, want, error, "sums")
    dead = torch.arange(got.shape[2]) >= case.counts[..., None]
    assert (got[dead] == 0).all()
    return got


@given(data=st.data(), call=calls(), count=st.sampled_from(MULTIPROCESSORS))
@settings(max_examples=examples(150))
def test_tensor_cores(backend, multiprocessors, data, call, count):  # noqa: F811
    case, q, q_positions, options = call
    multiprocessors(count)
    last = data.draw(st.sampled_from((0, 0, 1, 30, 1000)), "last")
    before = case.clone()
    names = ("window_start", "bias", "mask", "sinks", "scale", "softcap")
    check(q, case, q_positions, **{x: options[x] for x in names}, last=last, reduce_max=data.draw(st.booleans(), "max"))
    case.assert_equal(before)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("reduce_max", [False, True])
def test_every_kernel(backend, dtype, dim, reduce_max):
    case = prompt(200, dim=dim, dtype=dtype)
    q = torch.randn(1, 6, 200, dim).to(dtype)
    place = torch.arange(200, dtype=torch.int32)[None]
    check(q, case, place, reduce_max=reduce_max)
    check(q, case, place, reduce_max=reduce_max, softcap=5.0, window_start=place - 50, last=70)


@pytest.mark.parametrize("count", [1, 4, 16, 400])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 40)])
@pytest.mark.parametrize("reduce_max", [False, True])
def test_pieces_of_the_queries(backend, multiprocessors, count, dtype, dim, reduce_max):  # noqa: F811
    """Many queries and few entries, an odd group, empty rows; the observation window is one tile or none."""
    multiprocessors(count)
    case = prompt(140, rows=3, dim=dim, dtype=dtype)
    case.counts[1] = 0
    case.counts[2] = ints([140, 1])
    q = torch.randn(3, 6, 500, dim).to(dtype)
    place = torch.randint(0, 200, (3, 500), dtype=torch.int32)
    place[0, 400:] = -1
    for last in (0, 1, 64, 130):
        check(q, case, place, last=last, reduce_max=reduce_max)


def test_sums_of_a_causal_prompt(backend):
    """Every query hands out a weight of one: the sums add up to the number of queries, whatever their order."""
    case = prompt(150, dim=128)
    case.positions[:, :, :150] = torch.arange(149, -1, -1, dtype=torch.int32)
    q = torch.randn(1, 8, 150, 128).bfloat16()
    place = torch.arange(150, dtype=torch.int32)[None]
    sums = check(q, case, place)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), 150.0), rtol=1e-3, atol=1e-2)
    recent = check(q, case, place, last=32)
    torch.testing.assert_close(recent.sum(-1), torch.full((1, 2), 32.0), rtol=1e-3, atol=1e-2)


def test_a_prompt_in_pieces(backend):
    """Chunks of a prompt add up to the prompt, also for the maximum over the group, which belongs to each query."""
    case = prompt(190, heads=1)
    q = torch.randn(1, 4, 190, 64).bfloat16()
    place = torch.arange(190, dtype=torch.int32)[None]
    for reduce_max in (False, True):
        whole = check(q, case, place, reduce_max=reduce_max)
        parts = [check(q[:, :, a:b], case, place[:, a:b], reduce_max=reduce_max) for a, b in ((0, 77), (77, 190))]
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def test_uniform_by_hand(backend):
    """Zero queries: the query at position p gives 1 / (p + 1) to each of the entries 0 .. p."""
    case = prompt(100, heads=1)
    place = torch.arange(100, dtype=torch.int32)[None]
    sums = check(torch.zeros(1, 2, 100, 64).bfloat16(), case, place)
    want = torch.tensor([sum(1 / (p + 1) for p in range(e, 100)) for e in range(100)])
    torch.testing.assert_close(sums[0, 0, :100], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129])
def test_lengths_around_tiles_and_pages(backend, length):
    for page_size in (1, 3, 64):
        case = prompt(length, page_size=page_size)
        q = torch.randn(1, 2, 65, 64).bfloat16()
        bias = torch.full((1, 1, case.positions.shape[2]), -1e4)
        check(q, case, torch.full((1, 65), length, dtype=torch.int32), bias=bias)


def test_shared_pages_and_views_of_queries(backend):
    """Bugs 5 and 6; queries that are not aligned take the path without tensor cores."""
    case = prompt(100, rows=2, dim=128)
    case.table[:] = case.table[:1]
    transposed = torch.randn(2, 30, 8 * 128).bfloat16().view(2, 30, 8, 128).transpose(1, 2)
    place = torch.arange(70, 100, dtype=torch.int32).repeat(2, 1)
    sums = check(transposed, case, place)
    torch.testing.assert_close(check(strided(transposed), case, place), sums, rtol=1e-4, atol=1e-5)
    same = check(transposed[:1].expand(2, 8, 30, 128), case, place)
    assert torch.equal(same[0], same[1])


def test_rows_that_are_hidden_altogether(backend):
    """No weight is handed out where the log-sum-exp is -inf: a bias of -inf everywhere, a window of nothing."""
    case = prompt(70, rows=2)
    q = torch.randn(2, 4, 10, 64).bfloat16()
    place = torch.full((2, 10), 69, dtype=torch.int32)
    bias = torch.zeros(2, 1, case.positions.shape[2])
    bias[0] = NEG_INF
    assert (check(q, case, place, bias=bias)[0] == 0).all()
    assert (check(q, case, place, window_start=place + 1) == 0).all()


def test_large_logits(backend):
    """Hidden entries far above the log-sum-exp overflow on the way and still count for nothing."""
    case = prompt(100, heads=1)
    q = (torch.randn(1, 2, 100, 64) * 400).bfloat16()
    place = torch.arange(100, dtype=torch.int32)[None]
    assert check(q, case, place, scale=1.0).isfinite().all()


def test_replays_are_equal_bit_for_bit(backend, multiprocessors):  # noqa: F811
    for count in (1, 64):
        multiprocessors(count)
        case = prompt(300, dim=128)
        q = torch.randn(1, 8, 300, 128).bfloat16()
        place = torch.randint(0, 300, (1, 300), dtype=torch.int32)
        lse, _ = logsumexp(q, case, place, NOTHING)
        keys = (case.k_pages, *case.args[2:5])
        first = ops.column_sums(q, *keys, place, lse, **NOTHING)
        for _ in range(5):
            assert torch.equal(ops.column_sums(q, *keys, place, lse, **NOTHING), first)


def test_pool_of_more_than_2_31_elements(backend):
    """Bug 1: offsets do not fit 32 bits."""
    size = 4096
    pages = 2**31 // (size * 128) + 3
    try:
        k_pages = torch.empty(pages, size, 128, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for the pool")
    case = prompt(100, heads=1, dim=128, page_size=size)
    q = torch.randn(1, 4, 3, 128).bfloat16()
    place = ints([[97, 98, 99]])
    sums = check(q, case, place)
    k_pages[pages - 1, :100] = case.k_pages[int(case.table[0, 0, 0]), :100]
    lse, _ = logsumexp(q, case, place, NOTHING)
    table = torch.full_like(case.table, pages - 1)
    got = ops.column_sums(q, k_pages, table, case.counts, case.positions, place, lse, **NOTHING)
    assert torch.equal(got, sums)


def test_no_queries_and_no_entries(backend):
    case = prompt(20)
    nothing = torch.zeros(1, 4, 0, 64).bfloat16(), torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 4, 0)
    if backend != "reference":  # which cannot reshape nothing
        q, place, lse = nothing
        assert (ops.column_sums(q, case.k_pages, *case.args[2:5], place, lse, **NOTHING) == 0).all()
    case = make_paged(rows=2, heads=1, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=0, room=20)
    q = torch.randn(2, 4, 5, 64).bfloat16()
    assert (check(q, case, torch.zeros(2, 5, dtype=torch.int32)) == 0).all()
