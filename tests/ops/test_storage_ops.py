"""append, copy_pages, compact and overwrite against the reference, and the reference against worked examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, bits, make_paged, strided
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference

dtypes = st.sampled_from(STORAGE_DTYPES)
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "page_size": st.sampled_from([1, 3, 4, 16]),
        "k_dim": st.sampled_from([1, 5, 16, 33, 64]),
        "v_dim": st.sampled_from([1, 4, 16, 48]),
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


@settings(max_examples=examples(150))
@given(shape=shapes, n=st.integers(0, 20), k_dtype=dtypes, v_dtype=dtypes, with_columns=st.booleans())
def test_append_is_the_reference(shape, n, k_dtype, v_dtype, with_columns):
    case = make_paged(**shape, room=n)
    expected = case.clone()
    rows, heads = case.counts.shape
    k, v = tokens(case, n, k_dtype, v_dtype, shape["seed"])
    new_positions = torch.randint(-1, 50, (rows, n), dtype=torch.int32)
    new_columns = torch.randn(shape["n_columns"], rows, heads, n) if with_columns else None
    reference.append(*expected.args, k, v, new_positions, new_columns)
    ops.append(*case.args, k, v, new_positions, new_columns)
    case.assert_equal(expected)


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
def test_append_rounds_as_torch_does(stored, given_dtype):
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


def test_append_widens_exactly():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype).view(1, 1, -1, 64)
        n = values.shape[2]
        case = make_paged(rows=1, heads=1, page_size=8, k_dim=64, v_dim=64, max_count=0, room=n)
        ops.append(*case.args, values, values, torch.arange(n, dtype=torch.int32)[None])
        assert torch.equal(bits(reference.gather_pages(case.k_pages, case.table, case.counts, n)), bits(values.float()))


@settings(max_examples=examples(50))
@given(shape=shapes, n=st.integers(0, 6))
def test_copy_pages_is_the_reference(shape, n):
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


@settings(max_examples=examples(150))
@given(shape=shapes, fresh=st.sampled_from(["in place", "fresh", "first page shared"]))
def test_compact_is_the_reference(shape, fresh):
    case = make_paged(**shape)
    keep, keep_counts = random_keep(case, shape["seed"])
    target_table = case.table
    if fresh != "in place":
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
    expected = case.clone()
    if target_table is case.table:
        reference.compact(*expected.args[:3], expected.table, *expected.args[3:], keep, keep_counts)
    else:
        reference.compact(*expected.args[:3], target_table, *expected.args[3:], keep, keep_counts)
    ops.compact(*case.args[:3], target_table, *case.args[3:], keep, keep_counts)
    case.assert_equal(expected)


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
@given(shape=shapes)
def test_overwrite_is_the_reference(shape):
    case = make_paged(**shape)
    expected = case.clone()
    g = torch.Generator().manual_seed(shape["seed"])
    victims = (torch.rand(case.counts.shape, generator=g) * (case.counts + 1)).int() - 1
    reference.overwrite(*expected.args, victims)
    ops.overwrite(*case.args, victims)
    case.assert_equal(expected)


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
