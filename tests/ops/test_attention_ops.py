"""decode_attention, prefill_attention and column_sums against the float64 reference, over everything they can be asked.

Dead slots hold NaN throughout (paged_case), pages lie in random order, tables are as wide as needed and no wider.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_case import assert_attention, assert_close, calls, ints, logit_error, options, queries, statistics_error
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import bits, make_paged
from support.backends import examples

from kvcache import _C, ops
from kvcache.ops import reference

NEG_INF = float("-inf")
NOTHING = {"window_start": None, "sinks": None, "bias": None, "index": None, "index_counts": None}


def decode(q, case, statistics=None, **changes):
    call = {**NOTHING, "scale": 0.3, **changes}
    return ops.decode_attention(q, *case.args[:5], statistics=statistics, **call)


def prefill(q, case, q_positions, **changes):
    call = {**NOTHING, "mask": None, "scale": 0.3, **changes}
    return ops.prefill_attention(q, *case.args[:5], q_positions, **call)


# --- fuzzing ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), call=calls())
@settings(max_examples=examples(150))
def test_decode(backend, data, call):
    case, query_heads, g = call
    rows, heads, capacity = case.positions.shape
    shared = options(data, case, query_heads, g)
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    shared["window_start"] = None
    if data.draw(st.booleans(), "window"):
        shared["window_start"] = torch.randint(0, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32)
    mine = theirs = None
    if data.draw(st.booleans(), "statistics"):
        mine = torch.randn(rows, heads, capacity, generator=g)
        dead = torch.arange(capacity) >= case.counts[..., None]
        mine[dead] = float("nan")
        theirs = mine.clone()
        shared["statistics_decay"] = data.draw(st.sampled_from((1.0, 0.5, 0.0)), "decay")
        shared["statistics_max"] = data.draw(st.booleans(), "max")
    before = case.clone()
    got = decode(q, case, mine, **shared)
    want = reference.decode_attention(q.double(), *case.args[:5], statistics=theirs, **shared)
    error = logit_error(q, case, shared)
    assert_attention(got, want, q, error)
    if mine is not None:
        assert_close(mine, theirs, statistics_error(error, case, backend), "statistics")
        assert torch.equal(bits(mine[dead]), bits(theirs[dead]))
    case.assert_equal(before)


def draw_prefill(data, call):
    case, query_heads, g = call
    rows, heads, capacity = case.positions.shape
    shared = options(data, case, query_heads, g)
    tokens = data.draw(st.sampled_from((1, 2, 5, 48, 70)), "tokens")
    q = queries(data, case, query_heads, tokens, g)
    if data.draw(st.booleans(), "scattered queries"):
        q_positions = torch.randint(-1, 2 * capacity + 2, (rows, tokens), generator=g, dtype=torch.int32)
    else:
        q_positions = (torch.arange(tokens) + max(0, capacity - tokens)).int().repeat(rows, 1)
        q_positions[0, : tokens // 3] = -1  # left padding
    shared["window_start"] = None
    if data.draw(st.booleans(), "window"):
        shared["window_start"] = q_positions - data.draw(st.integers(0, capacity + 1), "size")
    shared["mask"] = None
    if data.draw(st.booleans(), "mask"):
        lines = data.draw(st.sampled_from((1, heads)), "mask heads")
        share = data.draw(st.sampled_from((0.02, 0.7)), "visible")
        shared["mask"] = torch.rand(rows, lines, tokens, capacity, generator=g) < share
    return case, q, q_positions, shared


@given(data=st.data(), call=calls())
@settings(max_examples=examples(150))
def test_prefill(backend, data, call):
    case, q, q_positions, shared = draw_prefill(data, call)
    before = case.clone()
    got = prefill(q, case, q_positions, **shared)
    want = reference.prefill_attention(q.double(), *case.args[:5], q_positions, **shared)
    assert_attention(got, want, q, logit_error(q, case, shared))
    case.assert_equal(before)


@given(data=st.data(), call=calls())
@settings(max_examples=examples(150))
def test_column_sums(backend, data, call):
    case, q, q_positions, shared = draw_prefill(data, call)
    for name in ("index", "index_counts"):
        shared[name] = None
    _, lse = reference.prefill_attention(q.double(), *case.args[:5], q_positions, **shared)
    summed = {name: shared[name] for name in ("window_start", "bias", "mask", "scale", "softcap")}
    summed["last"] = data.draw(st.sampled_from((0, 0, 1, 3, 1000)), "last")
    summed["reduce_max"] = data.draw(st.booleans(), "max")
    keys = (case.k_pages, *case.args[2:5])
    got = ops.column_sums(q, *keys, q_positions, lse, **summed)
    want = reference.column_sums(q.double(), *keys, q_positions, lse, **summed)
    assert_close(got, want, 2 * logit_error(q, case, shared), "sums")
    dead = torch.arange(got.shape[2]) >= case.counts[..., None]
    assert (got[dead] == 0).all()


# --- one thing at a time ----------------------------------------------------------------------------------------------


def test_uniform_attention_by_hand(backend):
    """A zero query weighs all visible entries equally; log-sum-exp is the logarithm of their number."""
    case = make_paged(rows=1, heads=1, page_size=4, k_dim=8, v_dim=3, max_count=0, room=10)
    zeros = torch.zeros(1, 1, 4, 8)
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 3.0], [5.0, 1.0, 0.0], [7.0, 1.0, 2.0]])[None, None]
    ops.append(*case.args, zeros, values, ints([[0, 1, 2, 3]]))
    out, lse = decode(torch.zeros(1, 2, 8), case)
    torch.testing.assert_close(out, torch.tensor([[[4.0, 1.0, 2.0]] * 2]))
    torch.testing.assert_close(lse, torch.full((1, 2), math.log(4)))
    out, lse = decode(torch.zeros(1, 2, 8), case, window_start=ints([2]), sinks=torch.tensor([0.0, math.log(2.0)]))
    torch.testing.assert_close(out, torch.tensor([[[4.0, 2 / 3, 2 / 3], [3.0, 0.5, 0.5]]]))
    out, lse = prefill(torch.zeros(1, 1, 3, 8), case, ints([[1, -1, 3]]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([[2.0, 1.0, 3.0], [0.0, 0.0, 0.0], [4.0, 1.0, 2.0]]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([math.log(2), NEG_INF, math.log(4)]))
    sums = ops.column_sums(
        torch.zeros(1, 1, 3, 8), case.k_pages, *case.args[2:5], ints([[1, -1, 3]]), lse, None, None, None, 0.3
    )
    torch.testing.assert_close(sums[0, 0, :4], torch.tensor([0.75, 0.75, 0.25, 0.25]))


def test_query_heads_read_the_keys_of_their_own_group(backend):
    """Query head g belongs to kv head g // group (not g % heads): every kv head's values are its number."""
    case = make_paged(rows=2, heads=4, page_size=3, k_dim=16, v_dim=5, max_count=30, room=1, seed=3)
    ops.append(*case.args, torch.randn(2, 4, 1, 16), torch.randn(2, 4, 1, 5), ints([[100], [100]]))
    for r in range(2):
        for h in range(4):
            case.v_pages[case.table[r, h][case.table[r, h] >= 0].long()] = h + 10 * r
    wanted = torch.arange(4).repeat_interleave(7) + torch.tensor([[0], [10]])
    out, _ = decode(torch.randn(2, 28, 16), case)
    torch.testing.assert_close(out, wanted[..., None].expand(2, 28, 5).float())
    out, _ = prefill(torch.randn(2, 28, 3, 16), case, ints([[200] * 3] * 2))
    torch.testing.assert_close(out, wanted[:, None, :, None].expand(2, 3, 28, 5).float())


@pytest.mark.parametrize("table_width", [0, 2])
def test_rows_without_entries(backend, table_width):
    """out = 0 and lse = -inf, whatever the sinks say; neighbours are not touched."""
    case = make_paged(rows=3, heads=2, page_size=4, k_dim=8, v_dim=8, max_count=0, room=4 * table_width)
    q = torch.randn(3, 6, 8)
    for sinks in (None, torch.ones(6)):
        statistics = torch.full(case.positions.shape, float("nan"))
        out, lse = decode(q, case, statistics, sinks=sinks)
        assert (out == 0).all()
        assert (lse == NEG_INF).all()
        assert statistics.isnan().all()
        out, lse = prefill(q[:, :, None].expand(3, 6, 5, 8), case, torch.zeros(3, 5, dtype=torch.int32), sinks=sinks)
        assert (out == 0).all()
        assert (lse == NEG_INF).all()
    if table_width:
        new = torch.randn(3, 2, 1, 8)
        ops.append(*case.args, new, new, ints([[-1], [0], [-1]]))
        out, lse = decode(q, case)
        torch.testing.assert_close(out[1], new[1, :, 0].repeat_interleave(3, 0))
        assert (out[[0, 2]] == 0).all()
        assert (lse[[0, 2]] == NEG_INF).all()
        assert lse[1].isfinite().all()


def test_hidden_by_bias_counts_as_read_for_sinks(backend):
    """A bias of -inf weighs nothing, yet the query has read something: its sink stays in the denominator."""
    case = make_paged(rows=1, heads=1, page_size=4, k_dim=8, v_dim=8, max_count=0, room=8)
    ops.append(*case.args, *torch.randn(2, 1, 1, 5, 8), ints([[0, 1, 2, 3, 4]]))
    bias = torch.full((1, 1, 8), NEG_INF)
    sinks = torch.tensor([0.5, -2.0])
    q = torch.randn(1, 2, 8)
    for got in (
        decode(q, case, bias=bias, sinks=sinks),
        prefill(q[:, :, None], case, ints([[9]]), bias=bias, sinks=sinks),
    ):
        assert (got[0] == 0).all()
        torch.testing.assert_close(got[1].flatten(), sinks)
    for got in (decode(q, case, bias=bias), prefill(q[:, :, None], case, ints([[9]]), bias=bias)):
        assert (got[0] == 0).all()
        assert (got[1] == NEG_INF).all()


@pytest.mark.parametrize("low", [-7e4, -1e30])
def test_logits_below_the_range_of_float16(backend, low):
    """Lanes behind the last entry must not win: every true logit is far below zero."""
    for count in (1, 15, 17, 63, 65, 130):
        case = make_paged(rows=1, heads=2, page_size=16, k_dim=32, v_dim=32, max_count=0, room=count)
        k, v = torch.randn(2, 1, 2, count, 32)
        ops.append(*case.args, k, v, torch.arange(count, dtype=torch.int32)[None])
        bias = torch.full((1, 1, case.positions.shape[2]), low)
        q = torch.randn(1, 8, 32)
        out, lse = decode(q, case, bias=bias)
        want = reference.decode_attention(
            q.double(), *case.args[:5], statistics=None, **NOTHING | {"bias": bias, "scale": 0.3}
        )
        assert_close(lse, want[1], 1e-6, "lse")
        assert_close(out, want[0], 5e-3 if low == -7e4 else 1.0, "out")
        assert out.abs().max() > 0.05
        out, lse = prefill(q[:, :, None], case, ints([[count]]), bias=bias)
        assert_close(lse[..., 0], want[1], 1e-6, "lse")
        assert out.abs().max() > 0.05


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_split_over_threads(backend, threads):
    """Few heads and many entries: pieces of one head are merged, with an odd group and an empty neighbour."""
    case = make_paged(rows=2, heads=1, page_size=16, k_dim=64, v_dim=40, max_count=0, room=3000)
    k, v = torch.randn(2, 1, 3000, 64), torch.randn(2, 1, 3000, 40)
    place = torch.arange(3000, dtype=torch.int32).repeat(2, 1)
    place[1] = -1
    ops.append(*case.args, k, v, place)
    q = torch.randn(2, 5, 64) * 3
    call = NOTHING | {"sinks": torch.randn(5), "scale": 0.2}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for changes in (
            {},
            {"window_start": ints([2900, 0])},
            {"index": ints([[list(range(0, 2900, 2))], [[0] * 1450]])},
        ):
            if "index" in changes:
                changes["index_counts"] = ints([[1450], [0]])
            mine = torch.rand(case.positions.shape)
            theirs = mine.clone()
            got = ops.decode_attention(q, *case.args[:5], statistics=mine, **call | changes)
            want = reference.decode_attention(q.double(), *case.args[:5], statistics=theirs, **call | changes)
            assert_attention(got, want, q, 2e-5)
            assert_close(mine, theirs, 2e-5, "statistics")
    finally:
        torch.set_num_threads(before)


def test_shared_pages(backend):
    """Beams and prefixes: rows and heads that read the very same pages."""
    case = make_paged(rows=2, heads=2, page_size=4, k_dim=16, v_dim=16, max_count=0, room=12)
    new = torch.randn(2, 2, 2, 10, 16)
    ops.append(*case.args, *new, torch.arange(10, dtype=torch.int32).repeat(2, 1))
    case.table[:] = case.table[0, 0]
    q = torch.randn(2, 4, 16)
    q[:] = q[0, 0]
    out, lse = decode(q, case)
    assert torch.equal(out, out[:1, :1].expand_as(out))
    assert torch.equal(lse, lse[:1, :1].expand_as(lse))


def test_pool_of_more_than_2_31_elements(backend):
    """Offsets do not fit 32 bits; the pool is reserved, but only its last pages are ever touched."""
    pages = 2**31 // (16 * 128) + 4
    try:
        k_pages, v_pages = (torch.empty(pages, 16, 128, dtype=torch.bfloat16) for _ in range(2))
    except RuntimeError:
        pytest.skip("no address space for the pool")
    small = make_paged(rows=1, heads=2, page_size=16, k_dim=128, v_dim=128, dtype=torch.bfloat16, max_count=0, room=20)
    new = torch.randn(2, 1, 2, 20, 128)
    place = torch.arange(20, dtype=torch.int32)[None]
    high = small.clone()
    high.k_pages, high.v_pages = k_pages, v_pages
    high.table = ints([[[pages - 1, pages - 3], [pages - 4, pages - 2]]])
    for case in (small, high):
        ops.append(*case.args, *new, place)
    q = torch.randn(1, 4, 2, 128)
    for mine, theirs in zip(decode(q[:, :, 0], high), decode(q[:, :, 0], small)):
        assert torch.equal(mine, theirs)
    positions = ints([[10, 19]])
    got, want = prefill(q, high, positions), prefill(q, small, positions)
    for mine, theirs in zip(got, want):
        assert torch.equal(mine, theirs)
    sums = [
        ops.column_sums(q, x.k_pages, *x.args[2:5], positions, got[1], None, None, None, 0.3) for x in (high, small)
    ]
    assert torch.equal(*sums)


@pytest.mark.slow
def test_many_rows(backend):
    """More rows than a GPU's second grid dimension has."""
    rows = 70_000
    k_pages = torch.randn(8, 2, 4)
    v_pages = torch.randn(8, 2, 4)
    table = (torch.arange(rows, dtype=torch.int32) % 8).view(rows, 1, 1)
    counts = (torch.arange(rows, dtype=torch.int32) % 3).view(rows, 1)
    positions = ints([0, 1]).repeat(rows, 1, 1)
    storage = (k_pages, v_pages, table.contiguous(), counts, positions)
    q = torch.randn(rows, 1, 4)
    call = NOTHING | {"scale": 0.5}
    got = ops.decode_attention(q, *storage, statistics=None, **call)
    want = reference.decode_attention(q, *storage, statistics=None, **call)
    assert_attention(got, want, q, 1e-5)
    place = torch.ones(rows, 1, dtype=torch.int32)
    got = ops.prefill_attention(q[:, :, None], *storage, place, mask=None, **call)
    assert_attention((got[0][:, 0], got[1][..., 0]), want, q, 1e-5)


def test_replays_are_equal_bit_for_bit(backend):
    case = make_paged(rows=2, heads=2, page_size=16, k_dim=128, v_dim=128, dtype=torch.bfloat16, max_count=500, seed=9)
    q = torch.randn(2, 8, 40, 128).bfloat16()
    positions = torch.randint(0, 1000, (2, 40), dtype=torch.int32)
    first = None
    for _ in range(25):
        statistics = torch.zeros(case.positions.shape)
        out = prefill(q, case, positions)
        sums = ops.column_sums(q, case.k_pages, *case.args[2:5], positions, out[1], None, None, None, 0.3)
        now = (*decode(q[:, :, 0], case, statistics), statistics, *out, sums)
        first = first or now
        for a, b in zip(now, first):
            assert torch.equal(a, b)


@pytest.mark.parametrize("length", [1, 47, 48, 49, 127, 128, 129, 500])
def test_causal_prompt_against_torch(backend, length):
    """The ordinary case, sorted and causal, against torch's own attention."""
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=64, v_dim=64, max_count=0, room=length)
    k, v = torch.randn(2, 1, 2, length, 64)
    place = torch.arange(length, dtype=torch.int32)[None]
    ops.append(*case.args, k, v, place)
    q = torch.randn(1, 6, length, 64)
    out, lse = prefill(q, case, place, scale=0.125)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.125)
    torch.testing.assert_close(out.transpose(1, 2), want, rtol=1e-4, atol=1e-5)
    sums = ops.column_sums(q, case.k_pages, *case.args[2:5], place, lse, None, None, None, 0.125)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), float(length)), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize("isa", _C.available_isas)
def test_every_instruction_set(isa):
    """The same tests with each of the kernels' builds that this machine can run."""
    if "KVCACHE_ISA" in os.environ:
        pytest.skip("already inside")
    here = Path(__file__)
    files = [str(here), str(here.with_name("test_selection_scores.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "cpu", *files],
        env=os.environ | {"KVCACHE_ISA": isa}, cwd=here.parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
