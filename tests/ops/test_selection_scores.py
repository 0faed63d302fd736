"""selection_scores against the float64 reference, and by hand."""

import math

import torch
from attention_case import assert_close, calls, ints, logit_error, queries
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import make_paged
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

NEG_INF = float("-inf")


def check(case, q, first, end, scale, soft, per_head):
    keys = (case.k_pages, *case.args[2:5])
    before = case.clone()
    got = ops.selection_scores(q, *keys, first, end, scale, soft, per_head)
    want = reference.selection_scores(q.double(), *keys, first, end, scale, soft, per_head)
    assert got.dtype == torch.float32
    # Raw votes may cancel: their error is that of the terms.
    size = q.shape[1] * (1.0 if soft else max(1.0, 4 * q.shape[-1] ** 0.5 * scale * float(q.float().abs().max())))
    tolerance = logit_error(q, case, {"scale": scale}) + size * 1e-6
    assert_close(got, want, tolerance, "scores")
    assert torch.equal(got == NEG_INF, want == NEG_INF)
    case.assert_equal(before)
    return got


@given(data=st.data(), call=calls(same_entries=True))
@settings(max_examples=examples(100))
def test_same_entries_in_all_heads(backend, data, call):
    case, query_heads, g = call
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    rows, capacity = q.shape[0], case.positions.shape[2]
    first, end = (torch.randint(-3, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32) for _ in range(2))
    scale = data.draw(st.sampled_from((1.0, 0.1)), "scale")
    check(case, q, first // 4, end, scale, data.draw(st.booleans(), "soft"), data.draw(st.booleans(), "per head"))


@given(data=st.data(), call=calls())
@settings(max_examples=examples(100))
def test_per_head_over_ragged_entries(backend, data, call):
    case, query_heads, g = call
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    rows, capacity = q.shape[0], case.positions.shape[2]
    first, end = (torch.randint(-3, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32) for _ in range(2))
    check(case, q, first // 4, end, 0.2, data.draw(st.booleans(), "soft"), True)


def test_by_hand(backend):
    """Two heads, three candidates between a sink and a recent entry; weights 1 : 2 : 1 and 1 : 1 : 0."""
    case = make_paged(rows=1, heads=2, page_size=2, k_dim=2, v_dim=1, max_count=0, room=5)
    far = -1e4
    logits = torch.tensor([[50.0, 0.0, math.log(2.0), 0.0, 70.0], [9.0, 3.0, 3.0, far, 8.0]])
    k = torch.stack([logits, torch.zeros(2, 5)], -1)[None]
    ops.append(*case.args, k, torch.zeros(1, 2, 5, 1), torch.arange(5, dtype=torch.int32)[None])
    q = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    call = (q, case.k_pages, *case.args[2:5], ints([1]), ints([4]), 1.0)
    soft = ops.selection_scores(*call)
    torch.testing.assert_close(soft[..., :5], torch.tensor([[[NEG_INF, 0.75, 1.0, 0.25, NEG_INF]]]))
    assert (soft[..., 5:] == NEG_INF).all()
    each = ops.selection_scores(*call, per_head=True)
    torch.testing.assert_close(each[0, :, 1:4], torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]))
    raw = ops.selection_scores(*call, soft=False)
    torch.testing.assert_close(raw[0, 0, 1:4], torch.tensor([3.0, 3.0 + math.log(2.0), far]))


def test_votes_of_a_row_sum_to_its_query_heads(backend):
    case = make_paged(rows=3, heads=2, page_size=16, k_dim=64, v_dim=1, max_count=300, same_counts=True, seed=5)
    case.positions[:] = case.positions[:, :1]
    case.counts[1] = 0
    got = check(case, torch.randn(3, 10, 64), ints([0, 0, 0]), ints([2**30] * 3), 0.125, True, False)
    sums = got.masked_fill(got == NEG_INF, 0).sum(-1)[:, 0]
    torch.testing.assert_close(sums, torch.where(case.counts[:, 0] > 0, 10.0, 0.0))


def test_logits_below_the_range_of_float16(backend):
    """Nothing but candidates takes part in the softmax, not even when all of them are far below zero."""
    case = make_paged(rows=1, heads=1, page_size=16, k_dim=4, v_dim=1, max_count=0, room=33)
    k = torch.full((1, 1, 33, 4), -1.0)
    ops.append(*case.args, k, torch.zeros(1, 1, 33, 1), torch.arange(33, dtype=torch.int32)[None])
    got = ops.selection_scores(torch.full((1, 1, 4), 3e4), case.k_pages, *case.args[2:5], ints([3]), ints([20]), 1.0)
    torch.testing.assert_close(got[0, 0, 3:20], torch.full((17,), 1 / 17))
    assert (got[0, 0, :3] == NEG_INF).all()
    assert (got[0, 0, 20:] == NEG_INF).all()
