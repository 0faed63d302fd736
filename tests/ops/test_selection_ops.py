"""topk and choose_victims against the reference, and the reference against what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

INF = float("inf")


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def cases(draw):
    """scores, counts, positions, k, first, end; scores with many ties, NaN and infinities."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    capacity = draw(st.sampled_from([0, 1, 7, 64, 300]))
    kind = draw(st.sampled_from(["normal", "few values", "constant", "special", "bits"]))
    scores = torch.randn(rows, heads, capacity, generator=g)
    if kind == "few values":
        scores = (scores * 2).round() / 2
    elif kind == "constant":
        scores = torch.full_like(scores, draw(st.sampled_from([0.0, 1.0, -INF, INF, NAN])))
    elif kind == "special":
        values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
        scores = values[torch.randint(len(values), scores.shape, generator=g)]
    elif kind == "bits":
        scores = torch.randint(-(2**31), 2**31 - 1, scores.shape, generator=g).int().view(torch.float32)
    counts = torch.randint(0, capacity + 1, (rows, heads), generator=g).int()
    positions = torch.stack([torch.randperm(2 * capacity + 1, generator=g)[:capacity] for _ in range(rows * heads)]) \
        if rows * heads else torch.empty(0, capacity)  # fmt: skip
    positions = positions.view(rows, heads, capacity).int()
    scores = torch.where(torch.arange(capacity) < counts[..., None], scores, NAN)
    k = torch.randint(-1, capacity + 3, (rows, heads), generator=g).int()
    first = torch.randint(-1, capacity + 1, (rows,), generator=g).int()
    end = first + torch.randint(-1, 2 * capacity + 2, (rows,), generator=g).int()
    return scores, counts, positions, k, first, end


@settings(max_examples=examples(300))
@given(case=cases())
def test_topk_is_the_reference(case):
    scores, counts, positions, k, first, end = case
    width = int(counts.max()) if counts.numel() else 0
    expected = reference.topk(scores, counts, positions, k, first, end, width)
    for got, want in zip(ops.topk(scores, counts, positions, k, first, end, width), expected):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


@settings(max_examples=examples(300))
@given(case=cases(), with_scores=st.booleans())
def test_choose_victims_is_the_reference(case, with_scores):
    scores, counts, positions, budgets, first, end = case
    scores = scores if with_scores else None
    got = ops.choose_victims(scores, counts, positions, budgets, first, end)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.choose_victims(scores, counts, positions, budgets, first, end))


@settings(max_examples=examples(60))
@given(case=cases())
def test_what_the_victim_leaves_is_what_topk_keeps(case):
    """Evicting one entry by choose_victims equals keeping all but one by topk."""
    scores, counts, positions, _, first, end = case
    victims = ops.choose_victims(scores, counts, positions, counts - 1, first, end)
    p = positions
    alive = torch.arange(p.shape[2]) < counts[..., None]
    candidates = (alive & (p >= first[:, None, None]) & (p < end[:, None, None])).sum(-1).int()
    index, n = ops.topk(scores, counts, positions, candidates - 1, first, end, p.shape[2])
    for r in range(counts.shape[0]):
        for h in range(counts.shape[1]):
            kept = set(index[r, h, : int(n[r, h])].tolist())
            assert kept == set(range(int(counts[r, h]))) - {int(victims[r, h])}


def test_topk_worked_example(backend):
    scores = torch.tensor([[[0.5, 0.1, 0.5, NAN, 0.9, 0.5, 7.0]]])
    positions = ints([[[9, 1, 3, 4, 0, 2, 5]]])
    # Position 0 is protected (below first), 9 too (end is 9); the dead slot 6 does not count.
    index, n = ops.topk(scores, ints([[6]]), positions, ints([[2]]), ints([1]), ints([9]), 5)
    assert index.tolist() == [[[0, 2, 4, 5, -1]]]
    assert n.tolist() == [[4]]
    # Three ties for one place: the lowest position (slot 5).
    index, n = ops.topk(scores, ints([[6]]), positions, ints([[1]]), ints([0]), ints([0]), 6)
    assert n.tolist() == [[6]]
    index, n = ops.topk(scores.clamp(max=0.5), ints([[6]]), positions, ints([[1]]), ints([1]), ints([10]), 2)
    assert index.tolist() == [[[4, 5]]]


def test_minus_infinity_is_taken_last_not_excluded(backend):
    scores = torch.tensor([[[-INF, 1.0, NAN]]])
    index, n = ops.topk(scores, ints([[3]]), ints([[[1, 2, 0]]]), ints([[2]]), ints([0]), ints([9]), 3)
    assert index.tolist() == [[[1, 2, -1]]]
    assert n.tolist() == [[2]]


@pytest.mark.parametrize("n", [16_384, 70_000])
@pytest.mark.parametrize("value", [0.0, -INF, NAN, 2.5])
def test_thousands_of_ties(backend, n, value):
    g = torch.Generator().manual_seed(n)
    positions = torch.randperm(n, generator=g).int()[None, None]
    scores = torch.full((1, 1, n), value)
    k = n // 3
    index, count = ops.topk(scores, ints([[n]]), positions, ints([[k]]), ints([0]), ints([n]), k)
    assert count.item() == k
    assert torch.equal(index[0, 0].long(), (positions[0, 0] < k).nonzero().squeeze(-1))
    victim = ops.choose_victims(scores, ints([[n]]), positions, ints([[k]]), ints([0]), ints([n]))
    assert positions[0, 0, victim.item()] == n - 1


def test_width_too_small_names_the_head(backend):
    scores = torch.zeros(2, 2, 4)
    positions = torch.arange(4).int().expand(2, 2, 4).contiguous()
    k = ints([[1, 2], [4, 3]])
    with pytest.raises(ValueError, match=r"topk: width=2 is too small, head \(1, 0\) keeps 4 entries"):
        ops.topk(scores, ints([[4, 4], [4, 4]]), positions, k, ints([0, 0]), ints([9, 9]), 2)


def test_views_need_no_copy(backend):
    """One head's lists for all: expand and slices, as a shared selection uses them."""
    g = torch.Generator().manual_seed(0)
    columns = torch.randn(3, 2, 4, 50, generator=g)
    counts = torch.full((2, 4), 40).int()
    positions = torch.arange(50).int().expand(2, 4, 50)
    args = (columns[1][:, :1], counts[:, :1], positions[:, :1], ints(5).expand(2, 1), ints([2, 3]), ints([30, 35]))
    plain = tuple(x.contiguous() for x in args)
    for got, want in zip(ops.topk(*args, 40), reference.topk(*plain, 40)):
        assert torch.equal(got, want)
    victims = ops.choose_victims(*args[:3], ints(5).expand(2, 1), *args[4:])
    assert torch.equal(victims, reference.choose_victims(*plain[:3], ints(5).expand(2, 1), *plain[4:]))


def test_within_budget_nobody_goes(backend):
    positions = torch.arange(8).int().expand(1, 2, 8)
    args = (ints([[8, 5]]), positions, ints([[7, 5]]), ints([0]), ints([100]))
    assert ops.choose_victims(None, *args).tolist() == [[0, -1]]
    assert ops.choose_victims(-positions.float(), *args).tolist() == [[7, -1]]
    protected = (*args[:3], ints([8]), ints([100]))
    assert ops.choose_victims(None, *protected).tolist() == [[-1, -1]]
