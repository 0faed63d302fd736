"""prefill_attention where the CUDA kernels do something of their own: tensor cores, tiles, pieces of a head's entries.

What every implementation must do is in test_attention_ops.py. Dead slots hold NaN throughout, pages lie in random order
and tables are no wider than needed (paged_case).
"""

import pytest
import torch
from attention_case import assert_attention, ints
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import make_paged, strided
from support.backends import examples
from tensor_core_case import HALF, MULTIPROCESSORS, assert_as_exact_as_torch, calls, multiprocessors  # noqa: F401

from kvcache import ops
from kvcache.ops import reference

NEG_INF = float("-inf")
NOTHING = dict.fromkeys(("window_start", "sinks", "bias", "mask", "index", "index_counts")) | {
    "scale": 0.1,
    "softcap": 0.0,
}


def attend(q, case, q_positions, **changes):
    return ops.prefill_attention(q, *case.args[:5], q_positions, **NOTHING | changes)


def check(q, case, q_positions, **changes):
    got = attend(q, case, q_positions, **changes)
    assert_as_exact_as_torch(got, case, q, q_positions, NOTHING | changes)
    return got


def prompt(length, *, rows=1, heads=2, dim=64, dtype=torch.bfloat16, page_size=16, seed=0, v_dim=None):
    """Storage that holds a prompt in order."""
    case = make_paged(
        rows=rows, heads=heads, page_size=page_size, k_dim=dim, v_dim=v_dim or dim, dtype=dtype, max_count=0,
        room=length, seed=seed,
    )  # fmt: skip
    fill(case, length, torch.Generator().manual_seed(seed))
    return case


def fill(case, length, g):
    rows, heads, _ = case.positions.shape
    slots = torch.arange(length)
    for r in range(rows):
        for h in range(heads):
            pages, places = case.table[r, h, slots // case.page_size].long(), slots % case.page_size
            case.k_pages[pages, places] = torch.randn(length, case.k_pages.shape[2], generator=g).to(case.k_pages.dtype)
            case.v_pages[pages, places] = torch.randn(length, case.v_pages.shape[2], generator=g).to(case.k_pages.dtype)
    case.positions[:, :, :length] = slots.int()
    case.counts[:] = length


@given(call=calls(), count=st.sampled_from(MULTIPROCESSORS))
@settings(max_examples=examples(250))
def test_tensor_cores(backend, multiprocessors, call, count):  # noqa: F811
    case, q, q_positions, options = call
    multiprocessors(count)
    before = case.clone()
    check(q, case, q_positions, **options)
    case.assert_equal(before)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("dim", "v_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
@pytest.mark.parametrize(("tokens", "group"), [(4, 4), (15, 4), (150, 1), (67, 5)])
def test_every_kernel(backend, multiprocessors, dtype, dim, v_dim, tokens, group):  # noqa: F811
    """Causal chunk behind 200 older entries: each head size meets each arrangement of warps."""
    multiprocessors(1)
    case = prompt(200 + tokens, heads=1, dim=dim, v_dim=v_dim, dtype=dtype)
    q = torch.randn(1, group, tokens, dim).to(dtype)
    place = torch.arange(200, 200 + tokens, dtype=torch.int32)[None]
    check(q, case, place, scale=dim**-0.5)
    check(q, case, place, scale=dim**-0.5, softcap=5.0, window_start=place - 50)


@pytest.mark.parametrize("count", [1, 4, 16, 400])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 40)])
@pytest.mark.parametrize("tokens", [3, 30])
def test_pieces_of_a_head(backend, multiprocessors, count, dtype, dim, tokens):  # noqa: F811
    """A few queries, many entries, an odd group, rows of very different lengths, one of them empty (bugs 3 and 13)."""
    multiprocessors(count)
    case = prompt(1500, rows=3, heads=2, dim=dim, dtype=dtype)
    case.counts[1, 1] = 0
    case.counts[2] = ints([257, 1])
    q = torch.randn(3, 10, tokens, dim).to(dtype)
    place = torch.arange(1500 - tokens, 1500, dtype=torch.int32).repeat(3, 1)
    place[0, 0] = -1
    for changes in (
        {},
        {"sinks": torch.randn(10)},
        {"window_start": place - 400},
        {"index": torch.arange(0, 1500, 3, dtype=torch.int32).view(1, 1, -1).repeat(3, 1, 1),
         "index_counts": ints([[500], [0], [1]])},
    ):  # fmt: skip
        if dtype != torch.float32:
            check(q, case, place, **changes)
            continue
        want = reference.prefill_attention(q.double(), *case.args[:5], place, **NOTHING | changes)
        assert_attention(attend(q, case, place, **changes), want, q, 2e-5)


def test_hidden_tiles_are_skipped_by_position_not_by_slot(backend):
    """Entries in reverse order: the first tile has the latest positions, early queries need the last tile (15)."""
    case = prompt(300)
    case.positions[:, :, :300] = torch.arange(299, -1, -1, dtype=torch.int32)
    q = torch.randn(1, 4, 300, 64).bfloat16()
    place = torch.arange(300, dtype=torch.int32)[None]
    check(q, case, place)
    check(q, case, place, window_start=place - 10)


def test_order_of_entries_does_not_matter(backend):
    """What eviction leaves behind: any order, gaps in the positions, a query that only sees some of them."""
    case = prompt(200, heads=1)
    other = case.clone()
    order = torch.randperm(200)
    slots = torch.arange(200)
    pages, places = case.table[0, 0, slots // 16].long(), slots % 16
    for mine, theirs in ((other.k_pages, case.k_pages), (other.v_pages, case.v_pages)):
        mine[pages, places] = theirs[pages[order], places[order]]
    gaps = torch.randperm(1000)[:200].sort().values.int()
    case.positions[0, 0, :200] = gaps
    other.positions[0, 0, :200] = gaps[order]
    q = torch.randn(1, 4, 20, 64).bfloat16()
    place = torch.randint(0, 1000, (1, 20), dtype=torch.int32)
    for a, b in zip(check(q, case, place), check(q, other, place)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 129])
def test_lengths_around_tiles_and_pages(backend, length):
    """The zeros that fill a tile are no entries: with low logits they would win (bugs 2 and 8)."""
    for page_size in (1, 3, 16, 64):
        case = prompt(length, page_size=page_size, dim=64)
        q = torch.randn(1, 2, 9, 64).bfloat16()
        bias = torch.full((1, 1, case.positions.shape[2]), -1e4)
        place = torch.full((1, 9), length, dtype=torch.int32)
        check(q, case, place, bias=bias)
        check(q, case, place)


def test_shared_pages_and_views_of_queries(backend):
    """Beams share their prefix's pages (6); queries are a transposed projection, also one that is not aligned (5)."""
    case = prompt(100, rows=3, dim=128)
    case.table[:] = case.table[:1]
    wide = torch.randn(3, 30, 8 * 128).bfloat16()
    place = torch.arange(70, 100, dtype=torch.int32).repeat(3, 1)
    transposed = wide.view(3, 30, 8, 128).transpose(1, 2)
    out = check(transposed, case, place)[0]
    again = attend(strided(transposed), case, place)[0]
    assert torch.equal(out, again)
    same = attend(transposed[:1].expand(3, 8, 30, 128), case, place)[0]
    assert torch.equal(same, same[:1].expand_as(same))


def test_pool_of_more_than_2_31_elements(backend):
    """Offsets do not fit 32 bits (bug 1); only the last pages of the reserved pool are ever touched."""
    size = 4096
    pages = 2**31 // (size * 128) + 3
    try:
        k_pages, v_pages = (torch.empty(pages, size, 128, dtype=torch.bfloat16) for _ in range(2))
    except RuntimeError:
        pytest.skip("no address space for the pool")
    small = prompt(100, heads=1, dim=128, page_size=size)
    high = small.clone()
    high.table[:] = pages - 1
    high.k_pages, high.v_pages = k_pages, v_pages
    for mine, theirs in ((k_pages, small.k_pages), (v_pages, small.v_pages)):
        mine[pages - 1, :100] = theirs[int(small.table[0, 0, 0]), :100]
    q = torch.randn(1, 4, 3, 128).bfloat16()
    for a, b in zip(attend(q, high, ints([[97, 98, 99]])), attend(q, small, ints([[97, 98, 99]]))):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_more_rows_than_a_second_grid_dimension(backend):
    """70,000 heads (bug 12), most of them empty."""
    rows = 35_000
    case = make_paged(rows=1, heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16, max_count=16)
    case.counts[:] = ints([[3, 16]])
    case.k_pages.nan_to_num_(0.5), case.v_pages.nan_to_num_(0.5)
    case.table = case.table[:, :, :1].clamp(min=0).repeat(rows, 1, 1)
    case.positions = case.positions[:, :, :16].repeat(rows, 1, 1)
    case.positions[..., :16] = torch.arange(16, dtype=torch.int32)
    case.counts = case.counts.repeat(rows, 1)
    case.counts[1:-1] = 0
    q = torch.randn(1, 2, 1, 64).bfloat16().expand(rows, 2, 1, 64)
    out, lse = attend(q, case, torch.full((rows, 1), 99, dtype=torch.int32))
    assert (lse[1:-1] == NEG_INF).all()
    assert (out[1:-1] == 0).all()
    assert lse[0].isfinite().all()
    assert torch.equal(out[0], out[-1])
    assert (out[0] != 0).any()


def test_replays_are_equal_bit_for_bit(backend, multiprocessors):  # noqa: F811
    """No sum depends on the order in which blocks, warps or threads happen to run (bugs 9 and 14)."""
    for count in (1, 64):
        multiprocessors(count)
        case = prompt(700, dim=128)
        q = torch.randn(1, 8, 40, 128).bfloat16()
        place = torch.randint(0, 700, (1, 40), dtype=torch.int32)
        first = attend(q, case, place)
        for _ in range(5):
            for a, b in zip(attend(q, case, place), first):
                assert torch.equal(a, b)


def test_peaks_that_rise_from_tile_to_tile(backend):
    """The running maximum moves at every tile, by much and by less than the slack that a block allows it."""
    for step in (0.5, 3.0, 40.0):
        case = prompt(512, heads=1)
        case.k_pages[:] = 0
        for slot in range(512):
            case.k_pages[int(case.table[0, 0, slot // 16]), slot % 16, 0] = step * (slot // 64)
        q = torch.zeros(1, 2, 5, 64).bfloat16()
        q[:, 0, :, 0], q[:, 1, :, 0] = 1, -1
        check(q, case, torch.full((1, 5), 600, dtype=torch.int32), scale=1.0)


def test_tree_of_drafts(backend):
    """Speculation: each node of a tree sees the prompt and its own ancestors only."""
    case = prompt(133)
    parents = [-1, 0, 0, 1, 1, 2, 5]
    mask = torch.zeros(1, 1, 7, case.positions.shape[2], dtype=torch.bool)
    mask[..., :126] = True
    for node in range(7):
        at = node
        while at >= 0:
            mask[0, 0, node, 126 + at] = True
            at = parents[at]
    q = torch.randn(1, 8, 7, 64).bfloat16()
    check(q, case, torch.full((1, 7), 200, dtype=torch.int32), mask=mask)


def test_a_selection_of_slots(backend):
    """TokenSelect's chunks: queries see the listed entries only, in list order, causal among them."""
    case = prompt(400)
    q = torch.randn(1, 4, 30, 64).bfloat16()
    place = torch.arange(370, 400, dtype=torch.int32)[None]
    listed = torch.cat([torch.arange(0, 350, 7), torch.arange(370, 400)]).int().view(1, 1, -1)
    for index in (listed, torch.cat([listed.flip(2), torch.full((1, 1, 9), -1, dtype=torch.int32)], 2)):
        check(q, case, place, index=index.contiguous(), index_counts=ints([[listed.shape[2]]]))
