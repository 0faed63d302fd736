"""topk and choose_victims: every backend against the reference, and worked examples."""

import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

INF = float("inf")
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


KINDS = ("normal", "few values", "constant", "special", "bits", "softmax", "low contrast")


def make_scores(shape, kind, g):
    """Scores with many ties, NaN and infinities, or all within a few bits of each other."""
    scores = torch.randn(shape, generator=g)
    if kind == "few values":
        return (scores * 2).round() / 2
    if kind == "constant":
        value = (0.0, 1.0, -INF, INF, NAN)[int(torch.randint(5, (), generator=g))]
        return torch.full_like(scores, value)
    if kind == "special":
        values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, -65504.0, -65536.0])
        return values[torch.randint(len(values), shape, generator=g)]
    if kind == "bits":
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=g).int().view(torch.float32)
    if kind == "softmax":
        return (scores * 3).softmax(-1)
    if kind == "low contrast":
        return 1000 + scores * 0.05
    return scores


def make_positions(shape, g):
    """Distinct positions in any order, with holes."""
    *heads, capacity = shape
    lines = [torch.randperm(2 * capacity + 1, generator=g)[:capacity] for _ in range(math.prod(heads))]
    return (torch.stack(lines) if lines else torch.empty(0, capacity)).view(shape).int()


@st.composite
def cases(draw):
    """scores, counts, positions, k, first, end."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    capacity = draw(st.sampled_from([0, 1, 7, 31, 32, 33, 64, 300, 2047, 2049]))
    scores = make_scores((rows, heads, capacity), draw(st.sampled_from(KINDS)), g)
    counts = torch.randint(0, capacity + 1, (rows, heads), generator=g).int()
    positions = make_positions((rows, heads, capacity), g)
    scores = torch.where(torch.arange(capacity) < counts[..., None], scores, NAN)
    k = torch.randint(-1, capacity + 3, (rows, heads), generator=g).int()
    first = torch.randint(-1, capacity + 1, (rows,), generator=g).int()
    end = first + torch.randint(-1, 2 * capacity + 2, (rows,), generator=g).int()
    return scores, counts, positions, k, first, end


def check_topk(case, width=None, **pages):
    scores, counts, positions, k, first, end = case
    if width is None:
        width = int(counts.max()) if counts.numel() else 0
    expected = reference.topk(scores, counts, positions, k, first, end, width, **pages)
    for got, want in zip(ops.topk(scores, counts, positions, k, first, end, width, **pages), expected):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)


@settings(max_examples=examples(200))
@given(case=cases())
def test_topk_is_the_reference(backend, case):
    check_topk(case)


def listed_pages(positions, counts, page_size, g):
    """A random ascending list of each head's pages, and NaN for what lies behind it."""
    rows, heads, capacity = positions.shape
    columns = -(-capacity // page_size)
    pages = torch.full((rows, heads, columns), -1, dtype=torch.int32)
    page_counts = torch.zeros(rows, heads, dtype=torch.int32)
    for r in range(rows):
        for h in range(heads):
            share = torch.rand((), generator=g)
            listed = (torch.rand(columns, generator=g) < share).nonzero().squeeze(-1).int()
            pages[r, h, : len(listed)] = listed
            page_counts[r, h] = len(listed)
    return pages, page_counts


@settings(max_examples=examples(100))
@given(case=cases(), page_size=st.sampled_from([1, 3, 16, 64]), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_topk_of_listed_pages_is_the_reference(backend, case, page_size, kind, seed):
    _, counts, positions, *rest = case
    g = torch.Generator().manual_seed(seed)
    pages, page_counts = listed_pages(positions, counts, page_size, g)
    scores = make_scores((*counts.shape, pages.shape[2] * page_size), kind, g)
    check_topk((scores, counts, positions, *rest), pages=pages, page_counts=page_counts, page_size=page_size)


LONG = [(kind, n) for kind in KINDS for n in (16_385, 70_001)] + [("normal", n) for n in (16_384, 20_001, 65_536)]


def test_topk_of_a_page_list_of_width_zero(backend):
    """It has no memory, so that its address must not be what tells a list from none."""
    positions = torch.arange(40, dtype=torch.int32).expand(1, 2, 40).contiguous()
    case = torch.empty(1, 2, 0), ints([[40, 3]]), positions, ints([[5, 5]]), ints([0]), ints([40])
    check_topk(case, width=4, pages=positions[:, :, :0], page_counts=ints([[0, 0]]), page_size=16)


@pytest.mark.parametrize(("kind", "n"), LONG)
def test_topk_of_long_rows(backend, kind, n):
    """Rows that several blocks share; heads that hold nothing, one entry or all, protected ones among them."""
    g = torch.Generator().manual_seed(n)
    shape = (2, 2, n)
    scores, positions = make_scores(shape, kind, g), make_positions(shape, g)
    counts = ints([[n, n - 1], [1, n // 2]])
    scores = torch.where(torch.arange(n) < counts[..., None], scores, NAN)
    for k in ([[2048, 1], [1, 7]], [[n - 1, n // 3], [0, n]], [[-1, n + 5], [5, n // 2 - 1]]):
        check_topk((scores, counts, positions, ints(k), ints([9, n // 4]), ints([2 * n - 99, n])), width=n)
    check_topk((scores, counts, positions, ints([[n, 0], [1, 3]]), ints([0, 5 * n]), ints([5 * n, 5 * n])))
    check_topk((scores, ints([[0, 0], [0, 1]]), positions, ints([[5, 5], [5, 5]]), ints([0, 0]), ints([n, n])), width=3)


@pytest.mark.parametrize("page_size", [3, 16, 64])
@pytest.mark.parametrize("kind", ["normal", "constant", "low contrast"])
def test_topk_of_many_listed_pages(backend, kind, page_size):
    n = 40_000
    g = torch.Generator().manual_seed(page_size)
    positions, counts = make_positions((1, 2, n), g), ints([[n - 5, n // 2]])
    pages, page_counts = listed_pages(positions, counts, page_size, g)
    scores = make_scores((1, 2, pages.shape[2] * page_size), kind, g)
    case = (scores, counts, positions, ints([[2048, 100]]), ints([50]), ints([2 * n - 70]))
    check_topk(case, pages=pages, page_counts=page_counts, page_size=page_size)


@pytest.mark.parametrize("kind", ["normal", "few values", "constant", "softmax"])
@pytest.mark.parametrize("n", [3000, 20_000])
def test_topk_repeats_itself(backend, n, kind):
    g = torch.Generator().manual_seed(n)
    scores, positions = make_scores((1, 1, n), kind, g), make_positions((1, 1, n), g)
    args = (scores, ints([[n]]), positions, ints([[n // 10]]), ints([4]), ints([2 * n - 64]), n)
    index, count = ops.topk(*args)
    for _ in range(25):
        again = ops.topk(*args)
        assert torch.equal(again[0], index)
        assert torch.equal(again[1], count)


def test_equal_positions_go_by_slot(backend):
    """Nobody stores two entries at one position, but if so the result is still the same everywhere."""
    for n in (40, 17_000):
        positions = torch.zeros(1, 1, n, dtype=torch.int32)
        case = (torch.ones(1, 1, n), ints([[n]]), positions, ints([[n // 3]]), ints([0]), ints([9]))
        check_topk(case)
        victim = ops.choose_victims(case[0], case[1], positions, ints([[1]]), ints([0]), ints([9]))
        assert victim.item() == 0


@settings(max_examples=examples(200))
@given(case=cases(), with_scores=st.booleans())
def test_choose_victims_is_the_reference(backend, case, with_scores):
    scores, counts, positions, budgets, first, end = case
    scores = scores if with_scores else None
    got = ops.choose_victims(scores, counts, positions, budgets, first, end)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.choose_victims(scores, counts, positions, budgets, first, end))


@settings(max_examples=examples(60))
@given(case=cases())
def test_what_the_victim_leaves_is_what_topk_keeps(backend, case):
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


@pytest.mark.parametrize("n", [8192, 8193, 20_001, 70_001])
@pytest.mark.parametrize("kind", [*KINDS, "oldest"])
def test_victims_of_long_rows(backend, kind, n):
    """Rows that several blocks share: the worst anywhere, ties across pieces, heads within their budget or empty."""
    g = torch.Generator().manual_seed(n)
    shape = (2, 3, n)
    scores, positions = None if kind == "oldest" else make_scores(shape, kind, g), make_positions(shape, g)
    counts = ints([[n, n - 1, 1], [0, n // 2, n]])
    if scores is not None:
        scores = torch.where(torch.arange(n) < counts[..., None], scores, NAN)  # what is dead never wins
    for budget, first, end in ((0, [0, 50], [2 * n, n]), (n - 1, [9, 0], [2 * n - 99, 2 * n + 1]), (0, [0, n], [9, n])):
        args = (scores, counts, positions, torch.full_like(counts, budget), ints(first), ints(end))
        got = ops.choose_victims(*args)
        assert torch.equal(got, reference.choose_victims(*args))
        assert torch.equal(got, ops.choose_victims(*args))


@pytest.mark.parametrize("worst", [0, 2047, 2048, 40_959, 40_960, 59_999])
def test_the_victim_at_the_edge_of_a_piece(backend, worst):
    scores, positions = torch.rand(1, 2, 60_000), torch.arange(60_000).int().expand(1, 2, -1)
    scores[0, 1, worst] = -1
    case = (scores, ints([[60_000, 60_000]]), positions, ints([[60_000, 0]]), ints([0]), ints([60_000]))
    assert ops.choose_victims(*case).tolist() == [[-1, worst]]


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


@pytest.mark.parametrize("n", [4, 20_000])
def test_width_too_small_names_the_head(backend, n):
    scores = torch.zeros(2, 2, n)
    positions = torch.arange(n).int().expand(2, 2, n).contiguous()
    args = (ints([[n, n], [n, n]]), positions, ints([[1, 2], [4, 3]]), ints([0, 0]), ints([n, n]), 2)
    if backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"topk: width=2 is too small, head \(1, 0\) keeps 4 entries"):
            ops.topk(scores, *args)
    else:  # nobody can raise there
        index, count = ops.topk(scores, *args)
        assert count.tolist() == [[1, 2], [4, 3]]
        assert index.tolist() == [[[0, -1], [0, 1]], [[0, 1], [0, 1]]]


@pytest.mark.slow
def test_many_rows(fast_backend):
    """More heads than a grid dimension other than the first may have."""
    rows, n = 65_537, 3
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(rows, 1, n, generator=g)
    counts = torch.full((rows, 1), n, dtype=torch.int32)
    positions = torch.arange(n).int().expand(rows, 1, n)
    first, end = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), n, dtype=torch.int32)
    victims = ops.choose_victims(scores, counts, positions, counts - 1, first, end)
    assert torch.equal(victims[:, 0].long(), scores[:, 0].argmin(-1))
    if fast_backend == "emulated":
        return  # a block of topk meets at many barriers: half a minute
    index, taken = ops.topk(scores, counts, positions, torch.ones_like(counts), first, end, 2)
    assert taken.eq(1).all()
    assert torch.equal(index[:, 0, 0].long(), scores[:, 0].argmax(-1))
    assert index[:, 0, 1].eq(-1).all()


def test_offsets_beyond_32_bits(fast_backend):
    """Rows of scores and positions that lie 2^31 elements apart."""
    far, n = 2**31 + 2**20, 40
    memory = mmap.mmap(-1, 4 * (far + n), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    huge = torch.frombuffer(memory, dtype=torch.int32)
    positions, scores = (huge.as_strided((2, 1, n), (far, 0, 1)), torch.rand(2, 1, n))
    positions.copy_(torch.arange(2 * n).view(2, 1, n))
    case = (scores, ints([[n], [n]]), positions, ints([[7], [9]]), ints([0, n + 3]), ints([n - 4, 2 * n]))
    check_topk(case)
    victims = ops.choose_victims(case[0], case[1], positions, *case[3:])
    assert torch.equal(victims, reference.choose_victims(case[0], case[1], positions, *case[3:]))
    bits = positions.view(torch.float32)  # denormal numbers, in the same order
    check_topk((bits, case[1], torch.arange(n).int().expand(2, 1, n), *case[3:]))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_inputs(backend, shape):
    rows, heads, capacity = shape
    none = torch.zeros(rows, heads, dtype=torch.int32)
    zero = torch.zeros(rows, dtype=torch.int32)
    args = (torch.zeros(shape), none, torch.zeros(shape, dtype=torch.int32), none + 3, zero, zero + 9)
    for width in (0, 4):
        index, count = ops.topk(*args, width)
        assert index.shape == (rows, heads, width)
        assert index.eq(-1).all()
        assert count.eq(0).all()
    assert ops.choose_victims(*args).eq(-1).all()
    pages = torch.zeros(rows, heads, 0, dtype=torch.int32)
    index, count = ops.topk(torch.zeros(rows, heads, 0), *args[1:], 4, pages, none, 8)
    assert index.eq(-1).all()
    assert count.eq(0).all()


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
