"""append, copy_pages, compact, overwrite and page_bounds: every backend against the reference, and worked examples."""

import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, Paged, bits, make_paged, strided
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 has no name for it

dtypes = st.sampled_from(STORAGE_DTYPES)
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "page_size": st.sampled_from([1, 3, 4, 16, 64]),
        "k_dim": st.sampled_from([1, 5, 12, 16, 33, 64, 128]),
        "v_dim": st.sampled_from([1, 4, 16, 48, 80]),
        "n_columns": st.integers(1, 3),
        "dtype": dtypes,
        "max_count": st.integers(0, 40),
        "seed": st.integers(0, 2**31),
    }
)


def tokens(case, n, k_dtype, v_dtype, seed, special=True):
    """New keys and values, strided, with some infinities, NaNs and halfway cases of rounding among them."""
    g = torch.Generator().manual_seed(seed)
    rows, heads = case.counts.shape
    k = torch.randn(rows, heads, n, case.k_pages.shape[2], generator=g)
    v = torch.randn(rows, heads, n, case.v_pages.shape[2], generator=g) * 100
    if special and n:
        for x in (k, v):
            flat = x.view(-1)
            values = torch.tensor([NAN, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 6e-8])
            spots = torch.randint(flat.numel(), (len(values),), generator=g)
            flat[spots] = values
    return strided(k.to(k_dtype)), strided(v.to(v_dtype))


def bounds_of(case):
    """Bounds that nobody has written yet."""
    return torch.full((case.k_pages.shape[0], 2, case.k_pages.shape[2]), NAN, dtype=case.k_pages.dtype)


def assert_same_bounds(a, b):
    """By value (which of two zeros is the smaller one does not matter), where nobody wrote included."""
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=examples(100))
@given(
    shape=shapes,
    ns=st.lists(st.one_of(st.integers(0, 20), st.sampled_from([1, 63, 64, 65, 300])), min_size=1, max_size=3),
    k_dtype=dtypes,
    v_dtype=dtypes,
    with_columns=st.booleans(),
    with_bounds=st.booleans(),
    view=st.booleans(),
)
def test_append_is_the_reference(backend, shape, ns, k_dtype, v_dtype, with_columns, with_bounds, view):
    """Several appends one after the other, as the bounds of a page that is filled bit by bit depend on all of them."""
    case = make_paged(**shape, room=sum(ns))
    rows, heads = case.counts.shape
    bounds = bounds_of(case) if with_bounds else None
    if with_bounds:
        reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    expected, expected_bounds = case.clone(), None if bounds is None else bounds.clone()
    g = torch.Generator().manual_seed(shape["seed"])
    for n in ns:
        k, v = tokens(case, n, k_dtype, v_dtype, shape["seed"])
        k, v = (k, v) if view else (k.contiguous(), v.contiguous())
        new_positions = torch.randint(-1, 50, (rows, n), dtype=torch.int32, generator=g)
        new_columns = torch.randn(shape["n_columns"], rows, heads, n, generator=g) if with_columns else None
        reference.append(*expected.args, k, v, new_positions, new_columns, expected_bounds)
        ops.append(*case.args, k, v, new_positions, new_columns, bounds)
        case.assert_equal(expected)
    if bounds is not None:
        assert_same_bounds(bounds, expected_bounds)
        # Kept up to date is the same as computed anew.
        reference.page_bounds(expected.k_pages, expected.table, expected.counts, expected_bounds)
        assert_same_bounds(bounds, expected_bounds)


@pytest.mark.parametrize("kept", ["all", "none", "left padding", "right padding", "scattered"])
@pytest.mark.parametrize("n", [512, 513, 8192, 8193, 9000])
def test_append_of_a_long_prompt(backend, n, kept):
    """More tokens than one warp or one round of a block numbers."""
    page_size = 16
    case = make_paged(rows=2, heads=2, page_size=page_size, k_dim=8, v_dim=4, max_count=20, room=n, n_columns=2, seed=n)
    bounds = bounds_of(case)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    expected, expected_bounds = case.clone(), bounds.clone()
    k, v = tokens(case, n, torch.float32, torch.bfloat16, n)
    new_positions = torch.arange(n, dtype=torch.int32).repeat(2, 1)
    drop = {
        "all": new_positions < 0,
        "none": new_positions >= 0,
        "left padding": new_positions < torch.tensor([[7], [n // 2]]),
        "right padding": new_positions >= torch.tensor([[1], [n // 2]]),
        "scattered": torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.3,
    }[kept]
    new_positions[drop] = -1
    new_columns = torch.randn(2, 2, 2, n)
    reference.append(*expected.args, k, v, new_positions, new_columns, expected_bounds)
    ops.append(*case.args, k, v, new_positions, new_columns, bounds)
    case.assert_equal(expected)
    assert_same_bounds(bounds, expected_bounds)


def test_bounds_worked_example(backend):
    case = make_paged(rows=1, heads=1, page_size=2, k_dim=2, v_dim=1, max_count=0, room=5)
    bounds = bounds_of(case)
    k = torch.tensor([[1.0, NAN], [3.0, NAN], [-2.0, 5.0], [0.0, NAN], [7.0, -7.0]])[None, None]
    v = torch.zeros(1, 1, 5, 1)
    positions = torch.arange(5, dtype=torch.int32)[None]
    inf = float("inf")
    ops.append(*case.args, k[:, :, :3], v[:, :, :3], positions[:, :3].contiguous(), None, bounds)
    pages = case.table[0, 0].long()
    assert bounds[pages[0]].tolist() == [[1, inf], [3, -inf]]  # of the second channel nothing is known
    assert bounds[pages[1]].tolist() == [[-2, 5], [-2, 5]]
    ops.append(*case.args, k[:, :, 3:4], v[:, :, 3:4], positions[:, 3:4].contiguous(), None, bounds)
    ops.append(*case.args, k[:, :, 4:], v[:, :, 4:], positions[:, 4:].contiguous(), None, bounds)
    assert bounds[pages[1]].tolist() == [[-2, 5], [0, 5]]  # a NaN key changes nothing
    assert bounds[pages[2]].tolist() == [[7, -7], [7, -7]]
    unused = [p for p in range(len(bounds)) if p not in pages.tolist()]
    assert bounds[unused].isnan().all()
    again = bounds_of(case)
    ops.page_bounds(case.k_pages, case.table, case.counts, again)
    assert_same_bounds(again, bounds)


def test_bounds_of_a_page_that_is_used_again_start_afresh(backend):
    case = make_paged(rows=1, heads=1, page_size=4, k_dim=3, v_dim=1, max_count=0, room=4)
    bounds = torch.zeros_like(bounds_of(case))  # what the page's last owner left
    for n in (1, 3):
        case.counts.zero_()
        k = torch.full((1, 1, n, 3), 5.0)
        ops.append(*case.args, k, k[..., :1], torch.arange(n, dtype=torch.int32)[None], None, bounds)
        page = case.table[0, 0, 0]
        assert bounds[page].eq(5).all()
        bounds.zero_()


@settings(max_examples=examples(60))
@given(shape=shapes, special=st.booleans())
def test_page_bounds_are_the_reference(backend, shape, special):
    case = make_paged(**shape)
    if special and case.k_pages.numel():
        flat = case.k_pages.view(-1)
        values = torch.tensor([NAN, float("inf"), -float("inf"), 0.0, -0.0], dtype=flat.dtype)
        flat[:: max(1, flat.numel() // 50)] = values[torch.arange(len(flat[:: max(1, flat.numel() // 50)])) % 5]
    bounds = bounds_of(case)
    expected = bounds.clone()
    reference.page_bounds(case.k_pages, case.table, case.counts, expected)
    ops.page_bounds(case.k_pages, case.table, case.counts, bounds)
    assert_same_bounds(bounds, expected)


def test_append_stores_what_it_says(backend):
    case = make_paged(rows=2, heads=1, page_size=2, k_dim=2, v_dim=1, max_count=0, room=3)
    k = torch.arange(12.0).view(2, 1, 3, 2)
    v = torch.arange(6.0).view(2, 1, 3, 1)
    new_positions = torch.tensor([[-1, 0, 1], [0, 1, 2]], dtype=torch.int32)
    ops.append(*case.args, k, v, new_positions)
    assert case.counts.tolist() == [[2], [3]]
    assert case.positions[0, 0, :2].tolist() == [0, 1]
    assert case.columns[0, 1, 0, :3].tolist() == [0, 0, 0]
    dense = reference.gather_pages(case.k_pages, case.table, case.counts)
    assert dense[0, 0, :2].tolist() == [[2, 3], [4, 5]]
    assert dense[1, 0, :3].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert reference.gather_pages(case.v_pages, case.table, case.counts)[0, 0, :2].tolist() == [[1], [2]]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_dtype", STORAGE_DTYPES)
def test_append_rounds_as_torch_does(backend, stored, given_dtype):
    """All 16-bit patterns, and float32 around every rounding border."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if given_dtype == torch.float32:
        values = torch.cat([patterns.view(stored).float(), (patterns.int() * 65536 + 0x7FFF).view(torch.float32)])
        values = torch.cat([values, values * (1 + 2**-9), values * (1 + 2**-12), torch.randn(2**16) * 1e-6])
    else:
        values = patterns.view(given_dtype)
    values = values[: values.numel() // 128 * 128].view(1, 1, -1, 128)
    n = values.shape[2]
    case = make_paged(rows=1, heads=1, page_size=16, k_dim=128, v_dim=128, dtype=stored, max_count=0, room=n)
    ops.append(*case.args, values, values, torch.arange(n, dtype=torch.int32)[None])
    dense = reference.gather_pages(case.k_pages, case.table, case.counts, n)
    assert torch.equal(bits(dense), bits(values.to(stored)))


def test_append_widens_exactly(backend):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype).view(1, 1, -1, 64)
        n = values.shape[2]
        case = make_paged(rows=1, heads=1, page_size=8, k_dim=64, v_dim=64, max_count=0, room=n)
        ops.append(*case.args, values, values, torch.arange(n, dtype=torch.int32)[None])
        assert torch.equal(bits(reference.gather_pages(case.k_pages, case.table, case.counts, n)), bits(values.float()))


@settings(max_examples=examples(50))
@given(shape=shapes, n=st.integers(0, 6))
def test_copy_pages_is_the_reference(backend, shape, n):
    case = make_paged(**shape)
    expected = case.clone()
    order = torch.randperm(case.k_pages.shape[0], dtype=torch.int32)
    n = min(n, len(order) // 2)
    target, source = order[:n], order[n:][torch.randint(len(order) - n, (n,))]  # a source may repeat
    reference.copy_pages(expected.k_pages, expected.v_pages, source, target)
    ops.copy_pages(case.k_pages, case.v_pages, source, target)
    case.assert_equal(expected)


def random_keep(case, seed):
    """Ascending slots of each head, some none, some all; padded with nonsense behind the count."""
    g = torch.Generator().manual_seed(seed)
    rows, heads = case.counts.shape
    chosen = []
    for count in case.counts.view(-1).tolist():
        share = torch.rand((), generator=g) * 1.4 - 0.2
        chosen.append((torch.rand(count, generator=g) < share).nonzero().squeeze(-1).int())
    width = max(map(len, chosen), default=0) + 2
    keep = torch.full((len(chosen), width), 10**6, dtype=torch.int32)
    for line, slots in zip(keep, chosen):
        line[: len(slots)] = slots
    keep_counts = torch.tensor([len(slots) for slots in chosen], dtype=torch.int32)
    return keep.view(rows, heads, width), keep_counts.view(rows, heads)


def target_of(case, keep_counts, fresh):
    """The table that compact moves the entries to; the pool grows by the pages that are fresh."""
    if fresh == "in place":
        return case.table
    # Pages that the source does not use, behind the others; the width may differ from the source's.
    old, size = case.k_pages.shape[0], case.page_size
    needed = (keep_counts + size - 1) // size
    width = int(needed.max()) + 1
    target_table = torch.full((*keep_counts.shape, width), -1, dtype=torch.int32)
    listed = torch.arange(width) < needed[..., None]
    target_table[listed] = torch.arange(old, old + int(listed.sum()), dtype=torch.int32)
    if fresh == "first page shared" and case.table.shape[2]:
        target_table[..., 0] = torch.where(needed > 0, case.table[..., 0], -1)
    for name in ("k_pages", "v_pages"):
        pages = getattr(case, name)
        more = torch.full((int(listed.sum()), *pages.shape[1:]), NAN, dtype=pages.dtype)
        setattr(case, name, torch.cat([pages, more]))
    return target_table


def check_compact(case, keep, keep_counts, fresh, with_bounds):
    target_table = target_of(case, keep_counts, fresh)
    expected = case.clone()
    expected_target = expected.table if target_table is case.table else target_table
    bounds, expected_bounds = (bounds_of(case), bounds_of(case)) if with_bounds else (None, None)
    reference.compact(*expected.args[:3], expected_target, *expected.args[3:], keep, keep_counts, expected_bounds)
    ops.compact(*case.args[:3], target_table, *case.args[3:], keep, keep_counts, bounds)
    case.assert_equal(expected)
    if with_bounds:
        assert_same_bounds(bounds, expected_bounds)


where_to = pytest.mark.parametrize("fresh", ["in place", "fresh", "first page shared"])


@where_to
@settings(max_examples=examples(60))
@given(shape=shapes, with_bounds=st.booleans())
def test_compact_is_the_reference(backend, shape, with_bounds, fresh):
    case = make_paged(**shape)
    check_compact(case, *random_keep(case, shape["seed"]), fresh, with_bounds)


@where_to
@pytest.mark.parametrize(("k_dim", "v_dim"), [(128, 64), (33, 5)])
@pytest.mark.parametrize("with_bounds", [False, True])
def test_compact_of_long_heads(backend, k_dim, v_dim, with_bounds, fresh):
    """Far more entries than one block holds at a time, moved by one slot, by many, or not at all."""
    n = 3000
    case = make_paged(
        rows=1, heads=4, page_size=16, k_dim=k_dim, v_dim=v_dim, dtype=torch.bfloat16, max_count=n, seed=8
    )
    case.counts[0, 0] = n - case.counts[0].max()  # one that is short; the others as they came
    case.counts[0, 0] = case.counts[0, 0].clamp(max=int((case.table[0, 0] >= 0).sum()) * 16)
    keep = torch.full((1, 4, n), -1, dtype=torch.int32)
    keep_counts = torch.zeros(1, 4, dtype=torch.int32)
    for h in range(4):
        slots = torch.arange(int(case.counts[0, h]), dtype=torch.int32)
        slots = (slots[1:], slots[::3], torch.cat([slots[:700], slots[701:]]), slots[len(slots) // 2 :])[h]
        keep[0, h, : len(slots)] = slots
        keep_counts[0, h] = len(slots)
    check_compact(case, keep, keep_counts, fresh, with_bounds)


def test_compact_moves_what_it_says(backend):
    case = make_paged(rows=1, heads=1, page_size=2, k_dim=1, v_dim=1, max_count=0, room=5)
    k = torch.arange(5.0).view(1, 1, 5, 1)
    ops.append(*case.args, k, -k, torch.arange(5, dtype=torch.int32)[None], k.view(1, 1, 1, 5))
    keep, keep_counts = torch.tensor([[[0, 3, 4]]], dtype=torch.int32), torch.tensor([[3]], dtype=torch.int32)
    ops.compact(*case.args[:3], case.table, *case.args[3:], keep, keep_counts)
    assert case.counts.tolist() == [[3]]
    assert case.positions[0, 0, :3].tolist() == [0, 3, 4]
    assert case.columns[0, 0, 0, :3].tolist() == [0, 3, 4]
    assert reference.gather_pages(case.v_pages, case.table, case.counts)[0, 0, :3, 0].tolist() == [0, -3, -4]


@settings(max_examples=examples(100))
@given(shape=shapes, with_bounds=st.booleans(), place=st.sampled_from(("any", "last", "last page", "first of a page")))
def test_overwrite_is_the_reference(backend, shape, with_bounds, place):
    case = make_paged(**shape)
    expected = case.clone()
    g = torch.Generator().manual_seed(shape["seed"])
    victims = (torch.rand(case.counts.shape, generator=g) * (case.counts + 1)).int() - 1
    size, last = shape["page_size"], case.counts - 1
    if place != "any":
        begin = last.div(size, rounding_mode="floor") * size
        chosen = {"last": last, "last page": torch.maximum(victims, begin), "first of a page": victims // size * size}
        victims = chosen[place].masked_fill(case.counts == 0, -1).int()
    bounds, expected_bounds = (bounds_of(case), bounds_of(case)) if with_bounds else (None, None)
    reference.overwrite(*expected.args, victims, expected_bounds)
    ops.overwrite(*case.args, victims, bounds)
    case.assert_equal(expected)
    if with_bounds:
        assert_same_bounds(bounds, expected_bounds)


@settings(max_examples=examples(60))
@given(shape=shapes, steps=st.lists(st.sampled_from(["append", "overwrite", "compact", "fresh", "copy"]), max_size=8))
def test_bounds_stay_true_whatever_moves_the_entries(backend, shape, steps):
    """Random sequences of all ops that write keys: the bounds are those that one gets from the keys themselves."""
    room = 3 * len(steps)
    case = make_paged(**shape, room=room)
    g = torch.Generator().manual_seed(shape["seed"])
    bounds = bounds_of(case)
    ops.page_bounds(case.k_pages, case.table, case.counts, bounds)

    def more_pages(n):
        """Ids of new pages; nobody has written their bounds."""
        nonlocal bounds
        for name in ("k_pages", "v_pages"):
            pages = getattr(case, name)
            setattr(case, name, torch.cat([pages, torch.full((n, *pages.shape[1:]), NAN, dtype=pages.dtype)]))
        bounds = torch.cat([bounds, torch.full((n, *bounds.shape[1:]), NAN, dtype=bounds.dtype)])
        return torch.arange(len(bounds) - n, len(bounds), dtype=torch.int32)

    for i, step in enumerate(steps):
        if step == "append":
            k, v = tokens(case, 3, torch.float32, torch.float32, shape["seed"] + i)
            new_positions = (torch.rand(len(case.counts), 3, generator=g) * 4).int() - 1
            ops.append(*case.args, k, v, new_positions, None, bounds)
        elif step == "overwrite":
            victims = (torch.rand(case.counts.shape, generator=g) * (case.counts + 1)).int() - 1
            ops.overwrite(*case.args, victims, bounds)
        elif step == "copy":  # onto pages that take the places of the old ones
            listed = case.table >= 0
            source = case.table[listed]
            target = more_pages(len(source))
            ops.copy_pages(case.k_pages, case.v_pages, source, target, bounds)
            case.table[listed] = target
        else:
            target_table = case.table
            if step == "fresh":
                listed = case.table >= 0
                target_table = case.table.masked_scatter(listed, more_pages(int(listed.sum())))
            keep, keep_counts = random_keep(case, shape["seed"] + i)
            ops.compact(*case.args[:3], target_table, *case.args[3:], keep, keep_counts, bounds)
            case.table = target_table
        live = set()
        for r, h in (case.counts > 0).nonzero().tolist():
            for column, begin in enumerate(range(0, int(case.counts[r, h]), case.page_size)):
                page = int(case.table[r, h, column])
                keys = case.k_pages[page, : int(case.counts[r, h]) - begin].float()
                low = keys.nan_to_num(math.inf, math.inf, -math.inf).amin(0)
                high = keys.nan_to_num(-math.inf, math.inf, -math.inf).amax(0)
                assert_same_bounds(bounds[page], torch.stack([low, high]))
                live.add(page)
        assert len(live) == int(((case.counts + case.page_size - 1) // case.page_size).sum())


def test_bounds_narrow_when_the_extreme_key_goes(backend):
    """By hand: pages of two; the largest key is evicted, the last entry takes its place and leaves its page."""
    case = make_paged(rows=1, heads=1, page_size=2, k_dim=1, v_dim=1, max_count=0, room=4)
    bounds = bounds_of(case)
    k = torch.tensor([9.0, 1, 4, -3]).view(1, 1, 4, 1)
    ops.append(*case.args, k, k, torch.arange(4, dtype=torch.int32)[None], None, bounds)
    pages = case.table[0, 0].long()
    assert bounds[pages, :, 0].tolist() == [[1, 9], [-3, 4]]
    ops.overwrite(*case.args, torch.tensor([[0]], dtype=torch.int32), bounds)
    assert bounds[pages, :, 0].tolist() == [[-3, 1], [4, 4]]
    ops.overwrite(*case.args, torch.tensor([[-1]], dtype=torch.int32), bounds)
    assert bounds[pages, :, 0].tolist() == [[-3, 1], [4, 4]]
    keep = torch.tensor([[[1, 2]]], dtype=torch.int32)
    ops.compact(*case.args[:3], case.table, *case.args[3:], keep, torch.tensor([[2]], dtype=torch.int32), bounds)
    assert bounds[pages[0], :, 0].tolist() == [1, 4]


def many_rows(rows=65_537):
    """More heads than a grid dimension other than the first may have; two slots each, pages in random order."""
    g = torch.Generator().manual_seed(0)
    return Paged(
        torch.randn(2 * rows, 1, 4, generator=g),
        torch.randn(2 * rows, 1, 2, generator=g),
        torch.randperm(2 * rows, generator=g).view(rows, 1, 2).int(),
        torch.full((rows, 1), 2, dtype=torch.int32),
        torch.arange(2 * rows, dtype=torch.int32).view(rows, 1, 2),
        torch.zeros(1, rows, 1, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_append_to_many_rows(fast_backend, n):
    case = many_rows()
    case.counts.fill_(2 - n)
    rows = len(case.counts)
    k, v = torch.randn(rows, 1, n, 4), torch.randn(rows, 1, n, 2)
    bounds = bounds_of(case)
    new_positions = (torch.arange(rows * n, dtype=torch.int32) % 1000).view(rows, n)
    ops.append(*case.args, k, v, new_positions, None, bounds)
    assert case.counts.eq(2).all()
    written = case.table[:, 0, 2 - n :].long()
    assert torch.equal(case.k_pages[written, 0], k[:, 0])
    assert torch.equal(case.v_pages[written, 0], v[:, 0])
    assert torch.equal(case.positions[:, 0, 2 - n :], new_positions)
    assert torch.equal(bounds[written], torch.stack([k[:, 0]] * 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "rows"), [("overwrite", 65_537), ("compact", 16_400)])
def test_moves_in_many_rows(fast_backend, op, rows):
    """compact has at least four blocks per head."""
    case = many_rows(rows)
    before = case.clone()
    if op == "overwrite":
        ops.overwrite(*case.args, torch.zeros_like(case.counts))
    else:
        one = torch.ones_like(case.counts)
        ops.compact(*case.args[:3], case.table, *case.args[3:], one[..., None].clone(), one)
    assert case.counts.eq(1).all()
    first, last = case.table[:, 0, 0].long(), case.table[:, 0, 1].long()
    assert torch.equal(case.k_pages[first], before.k_pages[last])
    assert torch.equal(case.v_pages[first], before.v_pages[last])
    assert torch.equal(case.positions[:, 0, 0], before.positions[:, 0, 1])


def test_overwrite_of_the_last_entry_only_drops_it(backend):
    case = make_paged(rows=1, heads=2, page_size=4, k_dim=3, v_dim=2, max_count=9, seed=3)
    before = case.clone()
    victims = case.counts - 1
    ops.overwrite(*case.args, victims)
    assert torch.equal(case.counts, (before.counts - 1).clamp(min=0))
    case.counts.copy_(before.counts)
    case.assert_equal(before)


def test_empty_inputs_change_nothing(backend):
    case = make_paged(rows=2, heads=2, page_size=4, k_dim=8, v_dim=8, seed=1)
    before = case.clone()
    none = torch.empty(2, 2, 0, 8)
    ops.append(*case.args, none, none, torch.empty(2, 0, dtype=torch.int32))
    empty = torch.empty(0, dtype=torch.int32)
    ops.copy_pages(case.k_pages, case.v_pages, empty, empty)
    ops.overwrite(*case.args, torch.full((2, 2), -1, dtype=torch.int32))
    case.assert_equal(before)
    nobody = make_paged(rows=0, heads=2, page_size=4, k_dim=8, v_dim=8)
    k = torch.empty(0, 2, 3, 8)
    ops.append(*nobody.args, k, k, torch.empty(0, 3, dtype=torch.int32))
    keep = torch.empty(0, 2, 0, dtype=torch.int32)
    ops.compact(*nobody.args[:3], nobody.table, *nobody.args[3:], keep, torch.empty(0, 2, dtype=torch.int32))
    ops.overwrite(*nobody.args, torch.empty(0, 2, dtype=torch.int32))


def huge(backend, *shape, elements=2**31 + 2**24):
    """``elements`` of 16 bits, [n, *shape]; on the host they cost no memory until they are written to."""
    n = elements // math.prod(shape)
    if backend == "cuda":
        return torch.zeros(n, *shape, dtype=torch.bfloat16, device="cuda")
    size = 2 * n * math.prod(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(n, *shape)


@pytest.fixture
def resident(fast_backend):
    """The backend's name; on a GPU the test's own tensors are there, as huge ones should not travel."""
    on_gpu = fast_backend == "cuda"
    with ops.use_backend("native" if on_gpu else ops.backend()), torch.device("cuda" if on_gpu else "cpu"):
        yield fast_backend


def test_offsets_beyond_32_bits(resident):
    """The last pages of a pool of more than 2^31 elements, and new tokens whose rows lie as far apart."""
    page_size, dim = 16, 128
    k_pages, v_pages, given = (huge(resident, page_size, dim) for _ in range(3))
    last = len(k_pages) - 1
    case = Paged(
        k_pages,
        v_pages,
        torch.tensor([[[last, last - 1]], [[last - 2, last - 3]]], dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, 1, 32, dtype=torch.int32),
        torch.zeros(1, 2, 1, 32),
    )
    k = given.as_strided((2, 1, 20, dim), (2**31, 0, dim, 1))
    k.copy_(torch.randn(2, 1, 20, dim))
    v = -k
    positions = torch.arange(20, dtype=torch.int32).repeat(2, 1)

    def check(pages, wanted):
        for stored, x in ((k_pages, wanted), (v_pages, -wanted)):
            assert torch.equal(stored[pages.long()].view(-1, dim)[: len(wanted)], x)

    ops.append(*case.args, k, v, positions)
    for r in range(2):
        check(case.table[r, 0], k[r, 0])
    ops.overwrite(*case.args, torch.zeros_like(case.counts))  # slot 0 is the last token now
    keep = torch.cat([torch.zeros(1), torch.arange(9, 18)]).int().repeat(2, 1, 1)
    ops.compact(*case.args[:3], case.table, *case.args[3:], keep, torch.full_like(case.counts, 10))
    kept = torch.cat([k[:, 0, 19:], k[:, 0, 9:18]], 1)
    ops.append(*case.args, k[:, :, :1], v[:, :, :1], positions[:, :1].contiguous())
    source = case.table[:, 0, 0].contiguous()
    ops.copy_pages(k_pages, v_pages, source, source - 5)
    for r in range(2):
        check(source[r : r + 1] - 5, torch.cat([kept[r], k[r, 0, :1]]))


def test_bounds_beyond_32_bits(resident):
    dim = 4096
    k_pages = huge(resident, 1, dim, elements=2**30 + 2**23)
    bounds = huge(resident, 2, dim, elements=2 * k_pages.numel())
    last = len(k_pages) - 1
    k_pages[last] = torch.randn(dim)
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    ops.page_bounds(k_pages, last * one, one[0], bounds)
    assert torch.equal(bounds[last], k_pages[last].expand(2, dim))
    # The ops that take bounds along: two entries of one head, on the last page and the one before it.
    v_pages, table = huge(resident, 1, 1, elements=len(k_pages)), torch.tensor([[[last - 1, last]]], dtype=torch.int32)
    positions, columns = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 1, 2)
    k_pages[last - 1] = torch.randn(dim)
    ops.overwrite(k_pages, v_pages, table, 2 * one[0], positions, columns, 0 * one[0], bounds)
    assert torch.equal(bounds[last - 1], k_pages[last].expand(2, dim))
    ops.copy_pages(k_pages, v_pages, table[0, 0, :1].contiguous(), table[0, 0, :1] - 1, bounds)
    assert torch.equal(bounds[last - 2], k_pages[last].expand(2, dim))
    bounds[last - 1] = 0
    ops.compact(k_pages, v_pages, table, table.clone(), 2 * one[0], positions, columns, one.clone(), one[0], bounds)
    assert torch.equal(bounds[last - 1], k_pages[last].expand(2, dim))


def test_threads_do_not_change_the_result():
    """Enough work that torch splits it over threads."""
    case = make_paged(rows=4, heads=8, page_size=16, k_dim=64, v_dim=64, max_count=200, room=100, seed=5)
    expected = case.clone()
    k, v = tokens(case, 100, torch.float32, torch.float32, 5)
    new_positions = torch.arange(100, dtype=torch.int32).expand(4, 100).contiguous()
    keep, keep_counts = random_keep(case, 5)
    torch.set_num_threads(4)
    try:
        ops.append(*case.args, k, v, new_positions)
        ops.compact(*case.args[:3], case.table, *case.args[3:], keep, keep_counts)
    finally:
        torch.set_num_threads(1)
    reference.append(*expected.args, k, v, new_positions)
    reference.compact(*expected.args[:3], expected.table, *expected.args[3:], keep, keep_counts)
    case.assert_equal(expected)
