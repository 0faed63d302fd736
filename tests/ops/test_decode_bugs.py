"""Bugs that kernels like decode_attention's had elsewhere; the numbers are those of our checklist of such bugs."""

import pytest
import torch
from attention_case import assert_attention, assert_close, ints, statistics_error
from decode_case import NOTHING, decode, expect, plan, query, storage
from paged_case import make_paged
from support.backends import CUDA as BACKENDS
from support.backends import use

from kvcache import ops
from kvcache.ops import reference

NEG_INF = float("-inf")


@pytest.mark.parametrize("group", [1, 4])
def test_bug_1_offsets_beyond_32_bits(backend, group):
    """A pool of more than 2^31 elements, of which only the last pages are ever touched."""
    pages = 2**31 // (16 * 128) + 4
    try:
        pool = [torch.empty(pages, 16, 128, dtype=torch.bfloat16) for _ in range(2)]
    except RuntimeError:
        pytest.skip("no address space for the pool")
    small = storage(1, 2, 30)
    high = small.clone()
    high.k_pages, high.v_pages = pool
    high.table = ints([[[pages - 1, pages - 3], [pages - 4, pages - 2]]])
    for old, new in zip(small.table.flatten().tolist(), high.table.flatten().tolist()):
        high.k_pages[new], high.v_pages[new] = small.k_pages[old], small.v_pages[old]
    q = query(small, group)
    for mine, theirs in zip(decode(q, high), decode(q, small)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 65, 200])
@pytest.mark.parametrize("group", [1, 4])
def test_bug_2_nan_behind_the_last_entry(backend, n, group):
    """Everything that no entry occupies is NaN: the rest of the last page, other pages, dead slots' positions."""
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=0, room=n)
    assert case.k_pages.isnan().all()
    with ops.use_backend("native"):
        ops.append(*case.args, *torch.randn(2, 1, 2, n, 64), torch.arange(n, dtype=torch.int32)[None])
    q = query(case, group)
    got = decode(q, case, plan=plan(case.counts, 3, backend))
    assert got[0].isfinite().all()
    assert_attention(got, expect(q, case), q, 2e-5)


@pytest.mark.parametrize("workers", [1, 2, 3, 24])
@pytest.mark.parametrize("group", [1, 5])
def test_bug_3_empty_rows_between_full_ones(backend, workers, group):
    case = storage(4, 2, 150, k_dim=64)
    case.counts[0, 1] = case.counts[2, 0] = case.counts[2, 1] = case.counts[3, 1] = 0
    q = query(case, group)
    mine, theirs = torch.ones(case.positions.shape), torch.ones(case.positions.shape)
    call = {"sinks": torch.randn(2 * group), "plan": plan(case.counts, workers, backend), "statistics_decay": 0.5}
    got, want = decode(q, case, mine, **call), expect(q, case, theirs, **call)
    empty = (case.counts == 0).repeat_interleave(group, 1)
    assert (got[0][empty] == 0).all()
    assert (got[1][empty] == NEG_INF).all()
    assert_attention(got, want, q, 2e-5)
    assert_close(mine, theirs, statistics_error(2e-5, case, backend), "statistics")
    for r, h in (~(case.counts == 0)).nonzero().tolist():  # as if alone
        alone = case.clone()
        others = torch.ones_like(alone.counts, dtype=torch.bool)
        others[r, h] = False
        alone.counts[others] = 0
        heads = slice(h * group, (h + 1) * group)
        want = expect(q, alone, **{k: v for k, v in call.items() if k == "sinks"})
        assert_close(got[0][r, heads], want[0][r, heads], 2e-5 + 2.0**-8, "out")


@pytest.mark.parametrize("unused", [-1, 2**31 - 1])
@pytest.mark.parametrize("group", [1, 4])
def test_bug_4_table_is_not_read_past_its_end(backend, unused, group):
    """Tables as wide as needed; what lies behind a head's pages names no page. asan and race builds see every read."""
    if backend == "reference" and unused > 0:
        pytest.skip("gathers before it hides")
    case = make_paged(rows=3, heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=200, seed=5)
    q = query(case, group)
    want = expect(q, case)
    case.table[case.table < 0] = unused
    got = decode(q, case, plan=plan(case.counts + 100, 7, backend))
    assert_attention(got, want, q, 2e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_bug_5_strides_of_q(backend, group):
    """q as projections leave it: heads inside tokens, the key and value projections' output beside it."""
    case = storage(3, 2, 100, k_dim=64)
    fused = torch.randn(3, 1, 2 * group + 4, 64).bfloat16()  # q, k and v of one projection
    q = fused[:, 0, : 2 * group]
    assert not q.is_contiguous()
    for mine, theirs in zip(decode(q, case), decode(q.contiguous(), case)):
        assert torch.equal(mine, theirs)
    turned = torch.randn(2 * group, 64, 3, 8).bfloat16()[..., 0].permute(2, 0, 1)  # innermost stride is not 1
    with pytest.raises(ValueError, match=r"\bq\b"):
        decode(turned, case)


@pytest.mark.parametrize("group", [1, 4])
def test_bug_6_scattered_and_shared_pages(backend, group):
    case = storage(2, 2, 160, k_dim=64)
    case.table[1] = case.table[0]  # a beam
    case.table[:, 1, :5] = case.table[:, 0, :5]  # and heads that share a prefix
    case.table[0, 0] = case.table[0, 0, torch.randperm(10)]
    q = query(case, group)
    assert_attention(decode(q, case), expect(q, case), q, 2e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_bug_11_a_plan_replayed_with_other_counts(backend, group):
    """As a captured graph replays it: lengths shrink, grow and vanish, pages move; the plan stays, or follows."""
    case = storage(2, 2, 704, k_dim=64)  # whole pages, so that any order of them will do
    q = query(case, group)
    g = torch.Generator().manual_seed(3)
    line = plan(case.counts // 2, 9, backend)
    for counts in ([704, 1, 0, 64], [0, 0, 0, 0], [1, 704, 704, 704], [65, 350, 63, 128]):
        case.counts[:] = ints(counts).view(2, 2)
        case.table[:] = case.table[:, :, torch.randperm(case.table.shape[2], generator=g)]
        mine, theirs = torch.zeros(case.positions.shape), torch.zeros(case.positions.shape)
        for changes in ({}, {"window_start": ints([600, 3])}):
            got = decode(q, case, mine, plan=line, **changes)
            assert_attention(got, expect(q, case, theirs, **changes), q, 2e-5)
            assert_close(mine, theirs, statistics_error(4e-5, case, backend), "statistics")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 4])
def test_bug_11_a_plan_for_other_rows_shows(backend, group):
    """Nothing on the host can tell; but then the result is NaN, not what the memory held before."""
    case = storage(3, 2, 50, k_dim=64)
    q = query(case, group)
    with use(backend):
        other = ops.plan_decode(torch.full((1, 2, 2), 50, dtype=torch.int32), 0, 50, 6)[0]
        out, lse = decode(q, case, plan=other)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.slow
def test_bug_12_more_rows_than_a_grid_dimension(fast_backend, monkeypatch):
    """65,536 rows and more, on tensor cores; every output was written."""
    monkeypatch.setenv("KVCACHE_EMULATED_SHARED", str(5 * 1024))  # one warp each: it is emulated sooner
    rows = 66_000
    k_pages, v_pages = torch.randn(2, 8, 8, 16).bfloat16()
    table = (torch.arange(rows, dtype=torch.int32) % 8).view(rows, 1, 1).contiguous()
    counts = (torch.arange(rows, dtype=torch.int32) % 4).view(rows, 1)
    positions = torch.arange(8, dtype=torch.int32).repeat(rows, 1, 1)
    storage = (k_pages, v_pages, table, counts, positions)
    q = torch.randn(8, 2, 16).bfloat16().repeat(rows // 8, 1, 1)
    got = ops.decode_attention(q, *storage, statistics=None, **NOTHING, scale=0.25)
    want = reference.decode_attention(q.float(), *storage, statistics=None, **NOTHING, scale=0.25)
    assert_attention(got, want, q, 2e-5)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 24, 200])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bug_13_forced_splits(backend, workers, group, dtype):
    """Several rows, odd groups, from one block for all to one for every other unit; log-sum-exps too."""
    case = storage(3, 2, 640, k_dim=64, dtype=dtype)
    case.counts[1, 1] = 0
    case.counts[0, 0] = 33
    q = query(case, group)
    call = {"sinks": torch.randn(2 * group), "plan": plan(case.counts, workers, backend)}
    got = decode(q, case, **call)
    assert_attention(got, expect(q, case, **call), q, 2e-5)


@pytest.mark.parametrize("group", [1, 8])
def test_bug_14_replays_are_equal_bit_for_bit(backend, group):
    """Also under the shuffled build, where every run has another order of threads, warps and blocks."""
    case = make_paged(rows=2, heads=2, page_size=16, k_dim=128, v_dim=128, dtype=torch.bfloat16, max_count=500, seed=9)
    q = query(case, group)
    line = plan(case.counts, 9, backend)
    first = None
    for _ in range(25):
        statistics = torch.zeros(case.positions.shape)
        now = (*decode(q, case, statistics, plan=line), statistics)
        first = first or now
        for a, b in zip(now, first):
            assert torch.equal(a, b)
