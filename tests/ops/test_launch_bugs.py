"""Bugs of launches and of what blocks leave each other; the numbers are those of the table in docs/emulation.md."""

import pytest
import torch
from attention_case import ints
from decode_case import decode, plan, query, storage
from paged_case import make_paged

import kvcache
from kvcache import ops
from kvcache.ops import reference

ROWS = 65_600  # more than a grid's second or third dimension may have


def shared_by_blocks(case, backend, seed):
    """One call of each op whose blocks put a result together, as functions of no arguments: all return tensors."""
    g = torch.Generator().manual_seed(seed)
    rows, heads = case.counts.shape
    device = case.counts.device
    q = query(case, 3, seed=seed).to(device)
    line = plan(case.counts, 7, backend)
    n = 20_000
    scores = torch.randn(1, 2, n, generator=g).to(device)
    positions = torch.stack([torch.randperm(n, generator=g) for _ in range(2)])[None].int().to(device)
    first, end, whole, k = (ints(x).to(device) for x in ([4], [n - 64], [[n, n // 2]], [[700, 9]]))
    tokens = q[:, :, None].expand(-1, -1, 3, -1).contiguous()
    last = int(case.counts.max())
    place = torch.arange(last - 3, last, dtype=torch.int32, device=device).repeat(rows, 1)
    hidden = dict.fromkeys(("window_start", "sinks", "bias", "mask", "index", "index_counts"))
    starts, stops = (torch.full((rows,), x, dtype=torch.int32, device=device) for x in (0, last))
    keys = (case.k_pages, *case.args[2:5])
    return (
        lambda: decode(q, case, plan=line),
        lambda: ops.topk(scores, whole, positions, k, first, end, 800),
        lambda: ops.prefill_attention(tokens, *case.args[:5], place, **hidden, scale=0.1),
        lambda: (ops.selection_scores(q, *keys, starts, stops, 0.1, True, True),),
    )


def test_bug_10_calls_leave_nothing_behind(backend):
    """Calls of two sizes in turn: what one left in memory that it shared between blocks would show in the next. In
    emulation blocks run one after another, so that a block which waits for a later one never ends."""
    cases = [storage(2, 2, 400, k_dim=64), storage(1, 2, 130, k_dim=64)]
    calls = [call for i, case in enumerate(cases) for call in shared_by_blocks(case, backend, i)]
    first = [call() for call in calls]
    for _ in range(3 if backend in ("emulated", "reference") else 25):
        for call, want in zip(calls, first):
            for a, b in zip(call(), want):
                assert torch.equal(a, b)


@pytest.mark.cuda
def test_bug_10_ten_thousand_launches_beside_others():
    """Blocks that another stream keeps from running together must not wait for each other."""
    if not (torch.cuda.is_available() and kvcache._C.cuda_info()["compiled"]):
        pytest.skip("no GPU, or kvcache built without nvcc")
    case = storage(2, 2, 400, k_dim=64)
    for name in ("k_pages", "v_pages", "table", "counts", "positions", "columns"):
        setattr(case, name, getattr(case, name).cuda())
    calls = shared_by_blocks(case, "native", 0)
    first = [call() for call in calls]
    noise, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(2500):
        if i % 5 == 0:
            with torch.cuda.stream(noise):
                matrix = torch.tanh(matrix @ matrix)
        for call, want in zip(calls, first):
            for a, b in zip(call(), want):
                wrong += (a != b).sum()
    torch.cuda.synchronize()
    assert wrong.item() == 0


@pytest.mark.slow
def test_bug_12_copies_and_bounds_of_more_rows_than_a_grid_dimension(fast_backend):
    """Also copy_pages, page_bounds and overwrite with bounds: every target was written, and nothing else."""
    k_pages = torch.arange(2.0 * ROWS).view(-1, 1, 1).repeat(1, 1, 4)
    v_pages = -k_pages
    order = torch.randperm(2 * ROWS, dtype=torch.int32)
    source, target = order[:ROWS], order[ROWS:]
    bounds = torch.full((2 * ROWS, 2, 4), -7.0)
    table, one = order.view(ROWS, 1, 2), torch.ones(ROWS, 1, dtype=torch.int32)
    ops.page_bounds(k_pages, table, one, bounds)
    written = table[:, 0, 0].long()
    assert torch.equal(bounds[written], k_pages[written].expand(-1, 2, -1))
    assert bounds[table[:, 0, 1].long()].eq(-7).all()
    bounds.copy_(k_pages.expand(-1, 2, -1))
    ops.copy_pages(k_pages, v_pages, source, target, bounds)
    for x in (k_pages, -v_pages, bounds):
        assert torch.equal(x[target.long(), 0, 0], source.float())
        assert torch.equal(x[source.long(), 0, 0], source.float())
    k_pages[:] = torch.arange(2.0 * ROWS).view(-1, 1, 1)
    columns, positions = torch.zeros(1, ROWS, 1, 2), torch.zeros(ROWS, 1, 2, dtype=torch.int32)
    ops.overwrite(k_pages, v_pages, table, 2 * one, positions, columns, 0 * one, bounds)
    assert torch.equal(bounds[written], k_pages[table[:, 0, 1].long()].expand(-1, 2, -1))


@pytest.mark.slow
def test_bug_12_scores_of_more_rows_than_a_grid_dimension(fast_backend):
    """query_similarity and page_scores: one row in three differs from its neighbours."""
    kind = torch.arange(ROWS) % 3
    a = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 3]])[kind].view(ROWS, 1, 4)
    got = ops.query_similarity(a, torch.tensor([1.0, 1, 0, 0]).expand(ROWS, 1, 4).contiguous())
    torch.testing.assert_close(got, torch.tensor([0.5**0.5, 0.5**0.5, 0])[kind])
    bounds = torch.tensor([[[-1.0] * 4, [2.0] * 4], [[3.0] * 4, [4.0] * 4]])
    table = (kind % 2).int().view(ROWS, 1, 1)
    counts, first = torch.ones(ROWS, 1, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int32)
    positions = torch.zeros(ROWS, 1, 4, dtype=torch.int32)
    got = ops.page_scores(a, bounds, table, counts, positions, first, first + 9, 1.0, False)
    assert torch.equal(got[:, 0, 0], torch.tensor([2.0, 8.0, 6.0])[kind])


@pytest.mark.slow
def test_bug_12_sums_of_more_rows_than_a_grid_dimension(fast_backend):
    """column_sums; most rows are empty, and their sums are zeros."""
    rows = 35_000  # of two heads each
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=0, room=2)
    reference.append(*case.args, torch.ones(1, 2, 2, 64), torch.ones(1, 2, 2, 64), ints([[0, 1]]))
    table, positions = (x.repeat(rows, 1, 1) for x in (case.table, case.positions))
    counts = torch.zeros(rows, 2, dtype=torch.int32)
    counts[::1000] = 2
    counts[-1] = 1
    q = torch.zeros(1, 2, 1, 64).bfloat16().expand(rows, 2, 1, 64)
    lse = torch.log(counts.float())[..., None]
    place = torch.full((rows, 1), 9, dtype=torch.int32)
    got = ops.column_sums(q, case.k_pages, table, counts, positions, place, lse, None, None, None, 1.0)
    want = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])[counts.long()]
    torch.testing.assert_close(got[..., :2], want)
    assert got[..., 2:].eq(0).all()


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("tokens", [1, 7])
def test_bug_13_log_sum_exps_from_op_to_op(backend, group, tokens):
    """Several rows, odd groups, ragged heads: column_sums takes prefill's log-sum-exps as they come, and each query
    that reads anything hands out a weight of one; decode's are those of the same queries."""
    case = storage(3, 2, 300, k_dim=64)
    case.counts[1, 1] = 0
    case.counts[0] = ints([33, 299])
    g = torch.Generator().manual_seed(tokens)
    q = (torch.randn(3, 2 * group, tokens, 64, generator=g) * 2).bfloat16()
    place = torch.full((3, tokens), 400, dtype=torch.int32)
    hidden = dict.fromkeys(("window_start", "sinks", "bias", "mask", "index", "index_counts"))
    _, lse = ops.prefill_attention(q, *case.args[:5], place, **hidden, scale=0.125)
    keys = (case.k_pages, *case.args[2:5])
    sums = ops.column_sums(q, *keys, place, lse, None, None, None, 0.125)
    total = torch.where(case.counts > 0, float(tokens), 0.0)
    torch.testing.assert_close(sums.sum(-1), total, rtol=1e-3, atol=0)
    one = q[:, :, 0].contiguous()
    for workers in (1, 3, 40):
        got = decode(one, case, plan=plan(case.counts, workers, backend))[1]
        torch.testing.assert_close(got, lse[:, :, 0], rtol=1e-4, atol=1e-4)
