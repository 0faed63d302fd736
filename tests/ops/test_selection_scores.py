"""selection_scores and page_scores against the float64 reference, and by hand."""

import math

import pytest
import torch
from attention_case import assert_close, calls, ints, logit_error, queries
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, bits, make_paged, strided
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

INF = float("inf")
NEG_INF = -INF


def tolerance(q, case, scale, soft):
    """Raw votes may cancel: their error is that of the terms."""
    largest = float(q.float().abs().max()) if q.numel() else 0.0
    size = q.shape[1] * (1.0 if soft else max(1.0, 4 * q.shape[-1] ** 0.5 * scale * largest))
    return logit_error(q, case, {"scale": scale}) + size * 1e-6


def check(case, q, first, end, scale, soft, per_head, pages=None, page_counts=None):
    args = (case.k_pages, *case.args[2:5], first, end, scale, soft, per_head, pages, page_counts)
    before = case.clone()
    got = ops.selection_scores(q, *args)
    want = reference.selection_scores(q.double(), *args)
    assert got.dtype == torch.float32
    assert_close(got, want, tolerance(q, case, scale, soft), "scores")
    assert torch.equal(got == NEG_INF, want == NEG_INF)
    case.assert_equal(before)
    return got


def bounds_of(case):
    """NaN for every page without live entries."""
    bounds = torch.full((case.k_pages.shape[0], 2, case.k_pages.shape[2]), NAN, dtype=case.k_pages.dtype)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    return bounds


def check_pages(case, q, first, end, scale, soft, per_head):
    bounds = bounds_of(case)
    args = (bounds, *case.args[2:5], first, end, scale, soft, per_head)
    before = bounds.clone()
    got = ops.page_scores(q, *args)
    want = reference.page_scores(q.double(), *args)
    assert got.dtype == torch.float32
    assert_close(got, want, tolerance(q, case, scale, soft), "page scores")
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(bits(bounds), bits(before))
    return got


def ranges(rows, capacity, g):
    """Candidates' positions: first and end, sometimes none."""
    first, end = (torch.randint(-3, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32) for _ in range(2))
    return first // 4, end


def some_pages(case, per_head, g, share):
    """Ascending columns of pages that are held, in random number; garbage behind them."""
    counts = case.counts if per_head else case.counts[:, :1]
    held = (counts + case.page_size - 1) // case.page_size
    lists = [[c for c in range(n) if torch.rand((), generator=g) < share] for n in held.flatten().tolist()]
    width = max(map(len, lists), default=0) + int(torch.randint(3, (), generator=g))
    pages = torch.full((*counts.shape, width), -1, dtype=torch.int32)
    for line, columns in zip(pages.flatten(0, 1), lists):
        line[: len(columns)] = torch.tensor(columns)
    return pages, ints([len(columns) for columns in lists]).view(counts.shape)


@given(data=st.data(), call=calls(same_entries=True))
@settings(max_examples=examples(100))
def test_same_entries_in_all_heads(backend, data, call):
    case, query_heads, g = call
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    first, end = ranges(q.shape[0], case.positions.shape[2], g)
    scale = data.draw(st.sampled_from((1.0, 0.1)), "scale")
    check(case, q, first, end, scale, data.draw(st.booleans(), "soft"), data.draw(st.booleans(), "per head"))


@given(data=st.data(), call=calls())
@settings(max_examples=examples(100))
def test_per_head_over_ragged_entries(backend, data, call):
    case, query_heads, g = call
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    first, end = ranges(q.shape[0], case.positions.shape[2], g)
    check(case, q, first, end, 0.2, data.draw(st.booleans(), "soft"), True)


@given(data=st.data(), same_entries=st.booleans())
@settings(max_examples=examples(100))
def test_listed_pages(backend, data, same_entries):
    case, query_heads, g = data.draw(calls(same_entries=same_entries))
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    per_head = not same_entries or data.draw(st.booleans(), "per head")
    pages, page_counts = some_pages(case, per_head, g, data.draw(st.sampled_from((0.0, 0.2, 0.7, 1.0)), "share"))
    first, end = ranges(q.shape[0], case.positions.shape[2], g)
    check(case, q, first, end, 0.2, data.draw(st.booleans(), "soft"), per_head, pages, page_counts)


@given(data=st.data(), same_entries=st.booleans())
@settings(max_examples=examples(100))
def test_page_scores(backend, data, same_entries):
    case, query_heads, g = data.draw(calls(same_entries=same_entries))
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    per_head = not same_entries or data.draw(st.booleans(), "per head")
    first, end = ranges(q.shape[0], case.positions.shape[2], g)
    check_pages(case, q, first, end, 0.2, data.draw(st.booleans(), "soft"), per_head)


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 112, 128, 192, 256])
def test_several_pieces(backend, dim, dtype, group):
    """Lengths of thousands: the softmax of a head is put together from many parts."""
    heads = 1 if group == 16 else 2
    case = make_paged(rows=2, heads=heads, page_size=16, k_dim=dim, v_dim=1, dtype=dtype, max_count=0, room=2600)
    case.counts[:] = ints([[2600, 1300], [0, 2599]])[:, :heads]
    g = torch.Generator().manual_seed(group)
    k = torch.randn(2, heads, 2600, dim, generator=g)
    for r in range(2):
        for h in range(heads):
            slots = torch.arange(int(case.counts[r, h]))
            case.k_pages[case.table[r, h, slots // 16].long(), slots % 16] = k[r, h, slots].to(dtype)
            case.positions[r, h, slots] = slots.int()
    q = torch.randn(2, case.table.shape[1] * group, dim, generator=g).to(dtype)
    check(case, q, ints([4, 0]), ints([2500, 10**6]), dim**-0.5, True, True)
    check_pages(case, q, ints([4, 0]), ints([2500, 10**6]), dim**-0.5, True, True)


@pytest.mark.parametrize("width", [1031, 1032])
def test_many_rows_of_many_entries(backend, width):
    """So many places that a thread counts the votes of several at once; rows that end anywhere."""
    rows = 130
    case = make_paged(rows=rows, heads=1, page_size=1, k_dim=8, v_dim=1, max_count=0, room=width)
    case.k_pages.copy_(torch.randn(case.k_pages.shape, generator=torch.Generator().manual_seed(0)))
    case.counts.copy_(width - 3 * torch.arange(rows)[:, None])
    case.positions.copy_(torch.arange(width).expand(rows, 1, width))
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    check(case, q, ints([5] * rows), ints([1000] * rows), 0.3, True, False)
    check(case, q, ints([5] * rows), ints([1000] * rows), 0.3, False, True)


@pytest.mark.parametrize("group", [17, 71, 128])
def test_one_kv_head_for_all(backend, group):
    """More query heads than the registers hold, and more than shared memory does."""
    for dim in (64, 256):
        case = make_paged(
            rows=1, heads=1, page_size=16, k_dim=dim, v_dim=1, dtype=torch.bfloat16, max_count=100, room=20, seed=3
        )
        q = torch.randn(1, group, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
        check(case, q, ints([3]), ints([150]), 0.1, True, False)
        check_pages(case, q, ints([3]), ints([150]), 0.1, True, False)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_lengths_around_tiles_and_pages(backend, page_size, count):
    case = make_paged(
        rows=1, heads=2, page_size=page_size, k_dim=64, v_dim=1, dtype=torch.bfloat16, max_count=0, room=130
    )
    k = torch.randn(1, 2, count, 64, generator=torch.Generator().manual_seed(count))
    reference.append(*case.args, k, k[..., :1], torch.arange(count, dtype=torch.int32)[None])
    q = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for soft in (True, False):
        check(case, q, ints([0]), ints([count]), 0.125, soft, False)
        check(case, q, ints([1]), ints([count - 1]), 0.125, soft, True)
        check_pages(case, q, ints([1]), ints([count - 1]), 0.125, soft, False)


def test_by_hand(backend):
    """Two heads, three candidates between a sink and a recent entry; weights 1 : 2 : 1 and 1 : 1 : 0."""
    case = make_paged(rows=1, heads=2, page_size=2, k_dim=2, v_dim=1, max_count=0, room=5)
    far = -1e4
    logits = torch.tensor([[50.0, 0.0, math.log(2.0), 0.0, 70.0], [9.0, 3.0, 3.0, far, 8.0]])
    k = torch.stack([logits, torch.zeros(2, 5)], -1)[None]
    reference.append(*case.args, k, torch.zeros(1, 2, 5, 1), torch.arange(5, dtype=torch.int32)[None])
    q = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    call = (q, case.k_pages, *case.args[2:5], ints([1]), ints([4]), 1.0)
    soft = ops.selection_scores(*call)
    torch.testing.assert_close(soft[..., :5], torch.tensor([[[NEG_INF, 0.75, 1.0, 0.25, NEG_INF]]]))
    assert (soft[..., 5:] == NEG_INF).all()
    each = ops.selection_scores(*call, per_head=True)
    torch.testing.assert_close(each[0, :, 1:4], torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]))
    raw = ops.selection_scores(*call, soft=False)
    torch.testing.assert_close(raw[0, 0, 1:4], torch.tensor([3.0, 3.0 + math.log(2.0), far]))
    # The second page alone: slots 2 and 3, and of the third slot 4, which is no candidate.
    listed = ops.selection_scores(*call, True, False, ints([[[1, 2, -1]]]), ints([[2]]))
    want = torch.tensor([[[2 / 3 + 1, 1 / 3, NEG_INF, NEG_INF, NEG_INF, NEG_INF]]])
    torch.testing.assert_close(listed, want)


def test_page_scores_by_hand(backend):
    """The example of Quest: q = [1, -2] over the keys (1, 3), (2, -1), (0, 0): bound 4, reached by the second."""
    case = make_paged(rows=1, heads=1, page_size=3, k_dim=2, v_dim=1, max_count=0, room=9)
    k = torch.tensor([[1.0, 3.0], [2.0, -1.0], [0.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [9.0, 9.0], [5.0, 5.0]])[
        None, None
    ]
    reference.append(*case.args, k, k[..., :1], torch.arange(7, dtype=torch.int32)[None])
    bounds = bounds_of(case)
    q = torch.tensor([[[1.0, -2.0]]])
    call = (q, bounds, *case.args[2:5], ints([0]), ints([7]), 1.0)
    raw = ops.page_scores(*call, soft=False)
    assert raw.tolist() == [[[4.0, 11.0, -5.0]]]
    soft = ops.page_scores(*call)
    torch.testing.assert_close(soft, torch.softmax(raw, -1))
    # A sink in the first page and the end of the context in the last one.
    guarded = ops.page_scores(q, bounds, *case.args[2:5], ints([1]), ints([6]), 1.0)
    assert guarded[0, 0].tolist() == [INF, soft[0, 0, 1].item(), INF]
    case.counts.fill_(6)
    assert ops.page_scores(*call, soft=False).tolist() == [[[4.0, 11.0, NEG_INF]]]


def test_no_key_has_a_larger_logit_than_its_page(backend):
    case = make_paged(rows=2, heads=2, page_size=16, k_dim=128, v_dim=1, dtype=torch.bfloat16, max_count=300, seed=3)
    q = torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    candidates = (ints([0, 0]), ints([2**30] * 2), 0.1, False, True)
    logits = ops.selection_scores(q, case.k_pages, *case.args[2:5], *candidates)
    bound = ops.page_scores(q, bounds_of(case), *case.args[2:5], *candidates)
    assert (logits.view(2, 2, -1, 16).amax(-1) <= bound + 1e-4).all()


def test_votes_of_a_row_sum_to_its_query_heads(backend):
    case = make_paged(rows=3, heads=2, page_size=16, k_dim=64, v_dim=1, max_count=300, same_counts=True, seed=5)
    case.positions[:] = case.positions[:, :1]
    case.counts[1] = 0
    got = check(case, torch.randn(3, 10, 64), ints([0, 0, 0]), ints([2**30] * 3), 0.125, True, False)
    sums = got.masked_fill(got == NEG_INF, 0).sum(-1)[:, 0]
    torch.testing.assert_close(sums, torch.where(case.counts[:, 0] > 0, 10.0, 0.0))


@pytest.mark.parametrize(("dim", "dtype"), [(4, torch.float32), (64, torch.float16), (128, torch.bfloat16)])
def test_logits_below_the_range_of_float16(backend, dim, dtype):
    """Nothing but candidates takes part in the softmax, not even when all of them are far below zero (bug 8)."""
    case = make_paged(rows=1, heads=1, page_size=16, k_dim=dim, v_dim=1, max_count=0, room=33, dtype=dtype)
    k = torch.full((1, 1, 33, dim), -1.0)
    reference.append(*case.args, k, torch.zeros(1, 1, 33, 1), torch.arange(33, dtype=torch.int32)[None])
    q = torch.full((1, 1, dim), 3e4).to(dtype)
    got = ops.selection_scores(q, case.k_pages, *case.args[2:5], ints([3]), ints([20]), 1.0)
    torch.testing.assert_close(got[0, 0, 3:20], torch.full((17,), 1 / 17))
    assert (got[0, 0, :3] == NEG_INF).all()
    assert (got[0, 0, 20:] == NEG_INF).all()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_query_heads_read_the_kv_head_of_their_group(backend, per_head, dtype):
    """Query head g belongs to kv head g // group, not g % heads: every kv head points at another entry."""
    heads, group, dim = 4, 3, 64
    case = make_paged(rows=1, heads=heads, page_size=16, k_dim=dim, v_dim=1, max_count=0, room=heads, dtype=dtype)
    k = 100 * torch.eye(heads, heads)[None, :, :, None].expand(1, heads, heads, dim)  # head h: entry h is the one
    reference.append(*case.args, k, k[..., :1], torch.arange(heads, dtype=torch.int32)[None])
    weight = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1])[None, :, None]  # which query heads vote at all
    q = (weight * torch.ones(1, heads * group, dim)).to(dtype)
    got = ops.selection_scores(q, case.k_pages, *case.args[2:5], ints([0]), ints([99]), 1.0, True, per_head)
    votes = torch.eye(heads) * weight.view(heads, group).sum(1)[:, None]
    votes += (1 - weight.view(heads, group)).sum(1)[:, None] / heads  # an undecided head gives all the same
    want = votes if per_head else votes.sum(0, keepdim=True)
    torch.testing.assert_close(got[0, :, :heads], want)


def test_pool_beyond_two_to_the_31_elements(backend):
    """Offsets of 64 bits (bug 1): the only pages in use lie at the end of a pool of 2^31 elements and more."""
    pages = 2**31 // (16 * 128) + 3
    k_pages = torch.empty(pages, 16, 128, dtype=torch.bfloat16)
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=128, v_dim=1, dtype=torch.bfloat16, max_count=40, seed=1)
    held = case.k_pages.shape[0]
    k_pages[pages - held :] = case.k_pages
    bounds = torch.empty(pages, 2, 128, dtype=torch.bfloat16)
    bounds[pages - held :] = bounds_of(case)
    table = torch.where(case.table >= 0, case.table + (pages - held), case.table)
    q = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    rest = (case.counts, case.positions, ints([1]), ints([60]), 0.1, True, True)
    assert torch.equal(
        ops.selection_scores(q, k_pages, table, *rest), ops.selection_scores(q, case.k_pages, case.table, *rest)
    )
    assert torch.equal(ops.page_scores(q, bounds, table, *rest), ops.page_scores(q, bounds_of(case), case.table, *rest))


@pytest.mark.parametrize("unused", [-1, 2**31 - 1, -(2**31)])
def test_unused_table_entries_are_never_followed(backend, unused):
    """Bug 4; and unused entries of a list of pages."""
    if backend == "reference" and unused != -1:
        pytest.skip("indexes with them, so it needs -1")
    case = make_paged(rows=2, heads=2, page_size=4, k_dim=64, v_dim=1, dtype=torch.bfloat16, max_count=90, seed=2)
    used = torch.arange(case.table.shape[2]) < (case.counts[..., None] + 3) // 4
    case.table.masked_fill_(~used, unused)
    q = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    pages, page_counts = some_pages(case, True, torch.Generator().manual_seed(1), 0.5)
    pages = torch.where(torch.arange(pages.shape[2]) < page_counts[..., None], pages, unused)
    plain = case.clone()
    plain.table.masked_fill_(~used, -1)
    rest = (ints([2, 0]), ints([100, 170]), 0.2, True, True)
    bounds = bounds_of(plain)
    for name, keys, lists in (
        ("selection_scores", case.k_pages, ()),
        ("selection_scores", case.k_pages, (pages, page_counts)),
        ("page_scores", bounds, ()),
    ):
        got, want = (getattr(ops, name)(q, keys, *x.args[2:5], *rest, *lists) for x in (case, plain))
        assert torch.equal(got, want)


def test_strided_queries(backend):
    """Bug 5: a projection that holds q, k and v side by side."""
    case = make_paged(rows=3, heads=2, page_size=16, k_dim=64, v_dim=1, dtype=torch.float16, max_count=50, seed=4)
    q = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    packed = torch.full((3, 24, 64), NAN, dtype=torch.float16)
    packed[:, 8:16] = q
    wide = strided(q[:, :, None])[:, :, 0]
    rest = (ints([0] * 3), ints([2**30] * 3), 0.2, True, True)
    for name, keys in (("selection_scores", case.k_pages), ("page_scores", bounds_of(case))):
        want = getattr(ops, name)(q, keys, *case.args[2:5], *rest)
        for view in (packed[:, 8:16], wide):
            assert not view.is_contiguous()
            assert torch.equal(getattr(ops, name)(view, keys, *case.args[2:5], *rest), want)


def test_shared_pages(backend):
    """Bug 6: rows that share pages, in any order."""
    case = make_paged(rows=2, heads=2, page_size=16, k_dim=64, v_dim=1, dtype=torch.bfloat16, max_count=90, seed=6)
    case.table[1], case.counts[1], case.positions[1] = (
        case.table[0].flip(0),
        case.counts[0].flip(0),
        case.positions[0].flip(0),
    )
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = torch.cat([q, q.view(1, 2, 2, 64).flip(1).reshape(1, 4, 64)])
    got = check(case, q, ints([0, 0]), ints([2**30] * 2), 0.2, True, True)
    assert torch.equal(got[1], got[0].flip(0))


@pytest.mark.slow
def test_more_rows_than_a_grid_dimension_holds(backend):
    """Bug 12: 65,536 rows and some; every score is written, those of empty rows (bug 3) too."""
    rows = 65_600
    case = make_paged(rows=1, heads=1, page_size=2, k_dim=8, v_dim=1, max_count=0, room=2)
    reference.append(*case.args, torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 1), ints([[0, 1]]))
    table, positions = case.table.expand(rows, 1, 1).contiguous(), case.positions.expand(rows, 1, 2).contiguous()
    counts = (torch.arange(rows) % 3).int()[:, None]
    q = torch.ones(rows, 1, 8)
    rest = (table, counts, positions, torch.zeros(rows).int(), torch.full((rows,), 9).int(), 1.0)
    want = torch.tensor([[NEG_INF, NEG_INF], [1.0, NEG_INF], [0.5, 0.5]])[counts[:, 0].long()][:, None]
    torch.testing.assert_close(ops.selection_scores(q, case.k_pages, *rest), want)


@pytest.mark.parametrize("group", [4, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_calls_repeat_bit_for_bit(backend, dtype, group):
    """Bug 14: no race decides a bit of the result."""
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=128, v_dim=1, dtype=dtype, max_count=900, seed=8)
    q = torch.randn(1, 2 * group, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    rest = (*case.args[2:5], ints([4]), ints([1500]), 0.1, True, True)
    bounds = bounds_of(case)
    runs = [(ops.selection_scores(q, case.k_pages, *rest), ops.page_scores(q, bounds, *rest)) for _ in range(5)]
    for scores, pages in runs[1:]:
        assert torch.equal(scores, runs[0][0])
        assert torch.equal(pages, runs[0][1])


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_key_shows_in_its_head_alone(backend, bad, dtype):
    """A live key that is no number spoils the softmax of its own head, as the reference's, and of no other."""
    case = make_paged(rows=1, heads=3, page_size=16, k_dim=64, v_dim=1, dtype=dtype, max_count=0, room=40)
    k = torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    k[0, 1, 25] = bad
    reference.append(*case.args, k, k[..., :1], torch.arange(40, dtype=torch.int32)[None])
    q = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).abs().to(dtype)
    args = (case.k_pages, *case.args[2:5], ints([0]), ints([40]), 0.1, True, True)
    got, want = ops.selection_scores(q, *args), reference.selection_scores(q.double(), *args)
    assert got[0, 1, :40].isnan().all()
    assert not got[0, ::2].isnan().any()
    assert_close(got, want, 1e-4, "scores")


def test_nothing_at_all(backend):
    for rows, heads, most in ((0, 2, 3), (2, 2, 0), (2, 1, 3)):
        case = make_paged(rows=rows, heads=heads, page_size=4, k_dim=8, v_dim=1, max_count=0, room=4 * most)
        q, bounds = torch.randn(rows, 2 * heads, 8), bounds_of(case)
        rest = (*case.args[2:5], ints([0] * rows), ints([9] * rows), 1.0)
        width = case.table.shape[2]
        for per_head in (False, True):
            lists = heads if per_head else 1
            got = ops.selection_scores(q, case.k_pages, *rest, True, per_head)
            assert torch.equal(got, torch.full((rows, lists, 4 * width), NEG_INF))
            got = ops.page_scores(q, bounds, *rest, True, per_head)
            assert torch.equal(got, torch.full((rows, lists, width), NEG_INF))
            none = torch.full((rows, lists, 2), -1, dtype=torch.int32)
            listed = (none, torch.zeros(rows, lists, dtype=torch.int32))
            got = ops.selection_scores(q, case.k_pages, *rest, True, per_head, *listed)
            assert torch.equal(got, torch.full((rows, lists, 8), NEG_INF))
