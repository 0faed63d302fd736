"""evict: every backend against choose_victims and overwrite of one layer after the other, and worked examples."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, Paged, make_paged
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

INF = float("inf")
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


class Layers:
    """Storage of several layers in one pool, and the lists that evict takes."""

    def __init__(self, cases):
        self.cases = cases
        before = 0
        for case in cases:
            case.table = torch.where(case.table >= 0, case.table + before, -1).int()
            before += len(case.k_pages)
        k_pages, v_pages = (torch.cat([getattr(case, name) for case in cases]) for name in ("k_pages", "v_pages"))
        for case in cases:
            case.k_pages, case.v_pages = k_pages, v_pages

    def clone(self):
        twin = object.__new__(Layers)
        first = self.cases[0]
        pages = first.k_pages.clone(), first.v_pages.clone()
        twin.cases = [Paged(*pages, *(x.clone() for x in case.args[2:])) for case in self.cases]
        return twin

    @property
    def args(self):
        first = self.cases[0]
        return (first.k_pages, first.v_pages, *([case.args[i] for case in self.cases] for i in range(2, 6)))

    def each(self, make):
        return [make(case) for case in self.cases]

    def assert_equal(self, other):
        for mine, theirs in zip(self.cases, other.cases):
            mine.assert_equal(theirs)


def expected(layers, scores, budgets, first, end, bounds=None):
    """The same in a copy, by the reference of the two ops."""
    twin, of_pages = layers.clone(), None if bounds is None else bounds.clone()
    for i, case in enumerate(twin.cases):
        victims = reference.choose_victims(
            scores[i] if scores else None, case.counts, case.positions, budgets[i], first[i], end[i]
        )
        reference.overwrite(*case.args, victims, of_pages)
    return twin, of_pages


def check(layers, scores, budgets, first, end, bounds=None):
    want, want_bounds = expected(layers, scores, budgets, first, end, bounds)
    ops.evict(*layers.args, scores, budgets, first, end, bounds)
    layers.assert_equal(want)
    if bounds is not None:
        torch.testing.assert_close(bounds.float(), want_bounds.float(), rtol=0, atol=0, equal_nan=True)


def bounds_of(layers):
    pages = layers.cases[0].k_pages
    return torch.full((len(pages), 2, pages.shape[2]), NAN, dtype=pages.dtype)


SCORES = ("oldest", "mixed", "column", "column of one head", "few values", "special", "every second")


def make_scores(kind, layers, seed):
    """One list of scores: views of the columns, with many ties, NaN and infinities, with gaps between the rows."""
    g = torch.Generator().manual_seed(seed)
    if kind == "oldest":
        return []

    def of(i, case):
        shape = case.positions.shape
        if kind == "mixed":
            return None if i % 2 else torch.randn(shape, generator=g)
        if kind == "column":
            return case.columns[-1]
        if kind == "column of one head":
            return case.columns[0][:, :1].expand(shape)
        if kind == "special":
            values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45])
            return values[torch.randint(len(values), shape, generator=g)]
        few = (torch.randn(shape, generator=g) * 2).round() / 2
        return few if kind == "few values" else torch.stack([few, few], 1)[:, 0]

    return [of(i, case) for i, case in enumerate(layers.cases)]


shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "page_size": st.sampled_from([1, 3, 4, 16, 64]),
        "k_dim": st.sampled_from([1, 5, 12, 16, 33, 64, 128]),
        "v_dim": st.sampled_from([1, 4, 16, 48, 80]),
        "n_columns": st.integers(1, 3),
        "dtype": st.sampled_from(STORAGE_DTYPES),
    }
)
ragged = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=4)


@settings(max_examples=examples(150))
@given(
    shape=shapes,
    sizes=ragged,
    kind=st.sampled_from(SCORES),
    with_bounds=st.booleans(),
    loose=st.booleans(),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_evict_is_the_reference(backend, shape, sizes, kind, with_bounds, loose, steps, seed):
    """Layers of different heads and capacities; several steps, so that a victim's slot is chosen again."""
    layers = Layers(
        [make_paged(**shape, heads=heads, max_count=n, seed=seed + i) for i, (heads, n) in enumerate(sizes)]
    )
    g = torch.Generator().manual_seed(seed)
    rows, bounds = shape["rows"], bounds_of(layers) if with_bounds else None
    for step in range(steps):
        # From all heads over their budgets to hardly one.
        budgets = layers.each(
            lambda c: (c.counts + torch.randint(-2, 1 + loose * 40, c.counts.shape, generator=g)).int()
        )
        first = [torch.randint(0, 12, (rows,), generator=g).int() for _ in sizes]
        end = [torch.randint(0, 90, (rows,), generator=g).int() for _ in sizes]
        check(layers, make_scores(kind, layers, seed + step), budgets, first, end, bounds)


def long_layers(counts, dim=8, n_columns=2):
    """One layer per list of counts [H]; each table is as wide as its fullest head needs."""
    cases = []
    for i, of_heads in enumerate(counts):
        case = make_paged(
            rows=1, heads=len(of_heads), page_size=16, k_dim=dim, v_dim=dim, n_columns=n_columns, max_count=0, seed=i
        )
        width = -(-max(of_heads) // 16)
        pages = len(of_heads) * width
        g = torch.Generator().manual_seed(i)
        case.table = torch.randperm(pages, generator=g).int().view(1, len(of_heads), width)
        case.k_pages, case.v_pages = (torch.randn(pages, 16, dim, generator=g) for _ in range(2))
        case.counts = ints([of_heads])
        case.positions = torch.stack([torch.randperm(16 * width, generator=g).int() for _ in of_heads])[None]
        case.columns = torch.rand(n_columns, *case.positions.shape, generator=g)
        cases.append(case)
    return Layers(cases)


@pytest.mark.parametrize("kind", ["oldest", "mixed", "column", "few values", "special"])
@pytest.mark.parametrize("n", [8192, 8193, 30_000])
def test_long_rows(backend, n, kind):
    """Heads that several blocks share, beside short ones, empty ones and such as are within their budget."""
    layers = long_layers([[n, n - 1, 1], [0, 40], [n // 2, n]])
    bounds = bounds_of(layers)
    for budgets in ([0] * 3, [n // 2 + 7, 10, n - 1]):
        limits = [case.counts.clone().fill_(budget) for case, budget in zip(layers.cases, budgets)]
        check(layers, make_scores(kind, layers, n), limits, [ints([9])] * 3, [ints([n - 5])] * 3, bounds)


@pytest.mark.parametrize("worst", [0, 2047, 2048, 40_959, 40_960, 59_999])
def test_the_victim_at_the_edge_of_a_piece(backend, worst):
    layers = long_layers([[30], [60_000, 60_000]], n_columns=1)
    scores = [None, torch.rand(1, 2, 60_000)]
    scores[1][0, 1, worst] = -1
    held = layers.cases[1].positions[0, 1, worst].item()
    budgets = [ints([[30]]), ints([[60_000, 59_999]])]
    check(layers, scores, budgets, [ints([0])] * 2, [ints([60_000])] * 2)
    assert layers.cases[1].counts.tolist() == [[60_000, 59_999]]
    assert held not in layers.cases[1].positions[0, 1, :59_999]


@pytest.mark.parametrize("n", [1, 40, 41, 42, 83])
def test_more_layers_than_a_launch_takes(backend, n):
    layers = Layers([make_paged(rows=2, heads=1, page_size=4, k_dim=8, v_dim=4, max_count=9, seed=i) for i in range(n)])
    before = [case.counts.clone() for case in layers.cases]
    check(layers, [], layers.each(lambda c: c.counts * 0), [ints([0, 0])] * n, [ints([99, 99])] * n)
    for case, counts in zip(layers.cases, before):
        assert torch.equal(case.counts, (counts - 1).clamp(min=0))


def test_no_layers_and_no_heads(backend):
    case = make_paged(rows=2, heads=2, page_size=4, k_dim=8, v_dim=8, seed=1)
    before = case.clone()
    ops.evict(case.k_pages, case.v_pages, *([[]] * 8))
    case.assert_equal(before)
    for rows, heads in ((0, 2), (2, 0)):
        layers = Layers([make_paged(rows=rows, heads=heads, page_size=4, k_dim=8, v_dim=8) for _ in range(2)])
        zero = torch.zeros(rows, dtype=torch.int32)
        ops.evict(*layers.args, [], layers.each(lambda c: c.counts), [zero] * 2, [zero] * 2)


def test_nothing_to_evict(backend):
    """Within the budget, or nothing but protected entries."""
    layers = Layers([make_paged(rows=2, heads=2, page_size=4, k_dim=8, v_dim=8, seed=i) for i in range(2)])
    before, bounds = layers.clone(), bounds_of(layers)
    for budgets, first, end in ((0, 0, 1000), (-1, 1000, 1000), (-1, 0, 0)):
        ops.evict(
            *layers.args, layers.each(lambda c: c.columns[0].clone()), layers.each(lambda c: c.counts + budgets),  # noqa: B023
            [ints([first] * 2)] * 2, [ints([end] * 2)] * 2, bounds,
        )  # fmt: skip
    layers.assert_equal(before)
    assert bounds.isnan().all()


def test_worked_example(backend):
    """By hand. Layer 0: position 0 is protected, the two lowest scores are equal and the later of them leaves. Layer 1
    has no scores, the oldest leaves; its second head is within its budget."""
    layers = Layers([make_paged(rows=1, heads=h, page_size=2, k_dim=1, v_dim=1, max_count=0, room=4) for h in (1, 2)])
    for case, scores in zip(layers.cases, ([0.0, 1, 1, 5], [0.0, 0, 0, 0])):
        k = torch.arange(4.0).view(1, 1, 4, 1).expand(1, case.counts.shape[1], 4, 1)
        positions, columns = ints([[0, 1, 2, 3]]), torch.tensor(scores).expand(1, 1, case.counts.shape[1], 4)
        reference.append(*case.args, k, -k, positions, columns.contiguous())
    bounds = bounds_of(layers)
    ops.evict(
        *layers.args, [layers.cases[0].columns[0], None], [ints([[3]]), ints([[3, 4]])], [ints([1]), ints([0])],
        [ints([9])] * 2, bounds,
    )  # fmt: skip
    one, two = layers.cases
    assert one.counts.tolist() == [[3]]
    assert one.positions[0, 0, :3].tolist() == [0, 1, 3]
    assert one.columns[0, 0, 0, :3].tolist() == [0, 1, 5]
    assert reference.gather_pages(one.v_pages, one.table, one.counts)[0, 0, :3, 0].tolist() == [0, -1, -3]
    page = one.table[0, 0, 1]  # of slot 2, which took the last entry and is alone there now
    assert bounds[page].tolist() == [[3], [3]]
    assert two.counts.tolist() == [[3, 4]]
    assert two.positions[0, 0, :3].tolist() == [3, 1, 2]
    assert bounds[two.table[0, 0].long(), :, 0].tolist() == [[1, 3], [2, 2]]
    assert bounds[two.table[0, 1].long()].isnan().all()


def test_budgets_and_scores_that_are_views_of_what_is_written(backend):
    """All heads go by the first head's count and score, which evicting from the first head changes."""
    layers = Layers(
        [make_paged(rows=3, heads=3, page_size=4, k_dim=8, v_dim=8, max_count=30, seed=i) for i in range(3)]
    )
    for case in layers.cases:
        case.counts[:] = case.counts.amin(1, keepdim=True) + ints([0, 1, 0])
        case.counts.clamp_(max=case.positions.shape[2])
        case.columns.nan_to_num_(0.0)
    for _ in range(3):
        budgets, scores = (layers.each(f) for f in (lambda c: c.counts[:, :1].expand(3, 3), lambda c: c.columns[0]))
        aliased = [x.flip(1)[:, -1:].expand_as(x) if i == 1 else x[:, :1].expand_as(x) for i, x in enumerate(scores)]
        check(layers, aliased, budgets, [ints([0] * 3)] * 3, [ints([99] * 3)] * 3)
        lower = layers.each(lambda c: c.counts - 1)
        check(layers, aliased, lower, [ints([0] * 3)] * 3, [ints([99] * 3)] * 3)


def test_calls_leave_nothing_behind(backend):
    """Calls of two sizes in turn: what one left in memory that blocks share would show in the next."""
    pairs = [(long_layers([[n, 100]]), n) for n in (20_000, 9000)]
    for i in range(3):
        for layers, n in pairs:
            scores = [torch.rand(layers.cases[0].positions.shape, generator=torch.Generator().manual_seed(i))]
            check(layers, scores, layers.each(lambda c: c.counts - 1), [ints([0])], [ints([n])])


@pytest.mark.slow
def test_many_rows(fast_backend):
    """More heads than a grid dimension other than the first may have."""
    rows = 65_600
    g = torch.Generator().manual_seed(0)
    k_pages, v_pages = torch.randn(2 * rows, 1, 4, generator=g), torch.randn(2 * rows, 1, 2, generator=g)
    table = torch.randperm(2 * rows, generator=g).view(rows, 1, 2).int()
    counts, positions = torch.full((rows, 1), 2, dtype=torch.int32), ints([0, 1]).repeat(rows, 1, 1)
    columns = torch.zeros(1, rows, 1, 2)
    keys = k_pages.clone()
    far = torch.full((rows,), 9, dtype=torch.int32)
    ops.evict(k_pages, v_pages, [table], [counts], [positions], [columns], [], [counts - 1], [far * 0], [far])
    assert counts.eq(1).all()
    assert positions[:, 0, 0].eq(1).all()
    assert torch.equal(k_pages[table[:, 0, 0].long()], keys[table[:, 0, 1].long()])


def test_offsets_beyond_32_bits(fast_backend):
    """The last pages of a pool of more than 2^31 elements, and scores whose rows lie as far apart."""
    if fast_backend == "cuda":
        pytest.skip("8 GB would travel to the GPU; test_storage_ops has such pools there")

    def huge(elements, dtype):
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        return torch.frombuffer(memory, dtype=dtype)

    far = 2**31 + 2**20
    k_pages, v_pages = (huge(far, torch.bfloat16)[: far // 2048 * 2048].view(-1, 16, 128) for _ in range(2))
    last = len(k_pages) - 1
    table = torch.tensor([[[last, last - 1]], [[last - 2, last - 3]]], dtype=torch.int32)
    scores = huge(far + 64, torch.float32).as_strided((2, 1, 32), (far, 0, 1))
    scores.copy_(torch.arange(64.0).flip(0).view(2, 1, 32))  # the last slot is the worst, then the one before it
    counts, positions = ints([[20], [31]]), torch.arange(32).int().repeat(2, 1, 1)
    columns = torch.zeros(1, 2, 1, 32)
    k_pages[table.long()] = torch.randn(2, 1, 2, 16, 128).bfloat16()
    kept = [k_pages[table[r, 0].long()].reshape(-1, 128).clone() for r in range(2)]
    for end in ([20, 31], [18, 5]):  # first the last entry itself, then one before it
        args = ([table], [counts], [positions], [columns], [scores], [counts - 1], [ints([0, 0])], [ints(end)])
        ops.evict(k_pages, v_pages, *args)
    assert counts.tolist() == [[18], [29]]
    assert positions[0, 0, 17] == 18
    assert positions[1, 0, 4] == 29
    assert torch.equal(k_pages[table[0, 0, 1], 1], kept[0][18])
    assert torch.equal(k_pages[table[1, 0, 0], 4], kept[1][29])


def test_threads_do_not_change_the_result():
    """Enough work that torch splits it over threads, in the middle of layers."""
    layers = long_layers([[3000] * 5, [200] * 3, [7000] * 7], dim=64)
    torch.set_num_threads(4)
    try:
        for _ in range(3):
            check(layers, make_scores("few values", layers, 1), layers.each(lambda c: c.counts - 1), [ints([4])] * 3,
                  [ints([2900])] * 3)  # fmt: skip
    finally:
        torch.set_num_threads(1)
