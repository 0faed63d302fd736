"""decode_attention in the shapes that matter to the CUDA kernels.

test_attention_ops.py has every argument over small storage; here storage is what tensor cores take, long enough to be
split, and work is shared out by all kinds of plans.
"""

import math

import pytest
import torch
from attention_case import assert_attention, assert_close, ints, logit_error, options, statistics_error
from decode_case import HALF, decode, expect, plan, query, storage
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, bits, make_paged
from support.backends import examples, use

from kvcache.ops import reference

# --- fuzzing ----------------------------------------------------------------------------------------------------------


@st.composite
def big_calls(draw):
    """Storage for the tensor cores, mostly; sometimes not quite."""
    page_size = draw(st.sampled_from((8, 16, 16, 24, 32, 64, 1, 5)))
    around = [0, 1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 127, 128, 129, 300, 1000, 3000]
    k_dim = draw(st.sampled_from((64, 128, 128, 256, 80, 96, 192, 16, 112)))
    v_dim = draw(st.sampled_from((k_dim, k_dim, k_dim, 64, 80, 128, 256, 96, 192)))
    rows, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    max_count = draw(st.sampled_from(around))
    case = make_paged(
        rows=rows, heads=heads, page_size=page_size, k_dim=k_dim, v_dim=v_dim, max_count=max_count,
        dtype=draw(st.sampled_from((*HALF, *HALF, torch.float32))), room=draw(st.sampled_from((0, 0, 70))),
        seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip
    group = draw(st.sampled_from((*range(1, 17), 1, 2, 4, 8, 17, 24, 33, 71)))
    return case, group


def some_plan(data, case, backend):
    """A plan for these lengths, for others, for more or fewer blocks; or none."""
    kind = data.draw(st.sampled_from(("none", "these", "others", "empty", "fuller")), "plan")
    if kind == "none" or backend in ("reference", "cpu"):
        return None
    workers = data.draw(st.sampled_from((1, 2, 3, 7, 24, 100)), "workers")
    counts, most = case.counts, max(case.positions.shape[2], 1)
    if kind == "others":
        counts = torch.randint(0, most + 1, counts.shape, dtype=torch.int32)
    elif kind == "empty":
        counts = torch.zeros_like(counts)
    elif kind == "fuller":
        counts, most = counts * 3 + 200, 3 * most + 200
    return plan(counts, workers, backend, most=most)


def page_lists(data, case, g):
    """Lists of pages: `index` and `index_counts`."""
    rows, heads, width = case.table.shape
    lines = data.draw(st.sampled_from((1, heads)), "page lists")
    held = (case.counts + case.page_size - 1) // case.page_size
    room = held if lines == heads else held.amax(1, keepdim=True)
    index = torch.full((rows, lines, width + 1), -1, dtype=torch.int32)
    index_counts = torch.zeros(rows, lines, dtype=torch.int32)
    for r in range(rows):
        for h in range(lines):
            listed = torch.randperm(int(room[r, h]), generator=g)[: data.draw(st.sampled_from((0, 1, 5, 1000)))]
            index[r, h, : len(listed)] = listed.int()
            index_counts[r, h] = len(listed)
    return index, index_counts


@given(data=st.data(), call=big_calls())
@settings(max_examples=examples(150))
def test_fuzz(backend, data, call):
    case, group = call
    rows, heads, capacity = case.positions.shape
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), "seed"))
    shared = options(data, case, heads * group, g)
    if data.draw(st.booleans(), "pages"):
        shared["index"], shared["index_counts"] = page_lists(data, case, g)
        shared["index_pages"] = True
    q = query(case, group, size=data.draw(st.sampled_from((1.0, 30.0)), "size"))
    how = data.draw(st.sampled_from(("plain", "plain", "aligned strides", "odd strides", "float32")), "q")
    if how == "float32":
        q = q.float()
    elif how != "plain":
        pad = 8 if how == "aligned strides" else 3
        wide = torch.full((q.shape[1] + 1, rows + 2, q.shape[2] + pad), NAN, dtype=q.dtype)
        view = wide[1:, 2:, pad:].permute(1, 0, 2)
        view.copy_(q)
        q = view
    shared["window_start"] = None
    if data.draw(st.booleans(), "window"):
        shared["window_start"] = torch.randint(0, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32)
    mine = theirs = None
    if data.draw(st.booleans(), "statistics"):
        mine = torch.randn(rows, heads, capacity, generator=g)
        dead = torch.arange(capacity) >= case.counts[..., None]
        mine[dead] = NAN
        theirs = mine.clone()
        shared["statistics_decay"] = data.draw(st.sampled_from((1.0, 0.5, 0.0)), "decay")
        shared["statistics_max"] = data.draw(st.booleans(), "max")
    before = case.clone()
    got = decode(q, case, mine, plan=some_plan(data, case, backend), **shared)
    want = expect(q, case, theirs, **shared)
    error = logit_error(q, case, shared)
    assert_attention(got, want, q, error)
    if mine is not None:
        assert_close(mine, theirs, statistics_error(error, case, backend), "statistics")
        assert torch.equal(bits(mine[dead]), bits(theirs[dead]))
    case.assert_equal(before)


# --- exactness --------------------------------------------------------------------------------------------------------


def torch_run(q, case, scale):
    """What the same dtype gives in torch: (out, probabilities [R, Hq, n])."""
    rows, heads, _ = case.table.shape
    n = int(case.counts[0, 0])
    k, v = (reference.gather_pages(x, case.table, case.counts, n) for x in (case.k_pages, case.v_pages))
    k, v = (x.repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    p = ((q[:, :, None] @ k.transpose(-1, -2)) * scale).softmax(-1)
    return (p @ v)[:, :, 0], p[:, :, 0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("dim", "group", "n"), [(64, 8, 700), (128, 4, 2000), (128, 1, 500), (256, 2, 300)])
def test_error_is_that_of_torch(backend, dtype, dim, group, n):
    """Errors against float64 are at most twice those of torch in the same dtype: out and statistics."""
    case = storage(2, 2, n, k_dim=dim, dtype=dtype, seed=dim + group)
    q = query(case, group, size=2.0)
    mine, exact = torch.zeros(case.positions.shape), torch.zeros(case.positions.shape)
    got, _ = decode(q, case, mine, plan=plan(case.counts, 5, backend))
    want, _ = expect(q, case, exact)
    out, p = torch_run(q, case, dim**-0.5)
    p = p.view(2, 2, group, n).mean(2)  # in the storage's dtype, as it is all along
    floor = 1e-7  # of float32 sums
    assert (got.double() - want).abs().max() <= 2 * (out.double() - want).abs().max() + floor
    exact = exact[..., :n].double()
    relative = (mine[..., :n].double() / exact - 1).abs().max()
    assert relative <= 2 * (p.double() / exact - 1).abs().max() + 2e-6


def test_small_probabilities_are_kept(backend):
    """One entry takes nearly all; the others' statistics are exact to their own size, not to that one's."""
    case = storage(1, 1, 400, k_dim=64, dtype=torch.float16)
    q = query(case, 4)
    page, slot = int(case.table[0, 0, 37 // 16]), 37 % 16
    case.k_pages[page, slot] = q[0].float().mean(0).half() * 5
    mine, exact = torch.zeros(case.positions.shape), torch.zeros(case.positions.shape)
    decode(q, case, mine)
    expect(q, case, exact)
    assert exact.max() > 0.5
    assert exact[..., :400].min() < 1e-5
    torch.testing.assert_close(mine[..., :400], exact[..., :400], rtol=2.0**-11, atol=0)


def test_statistics_over_many_steps(backend):
    """What 40 steps add up to: rounding does not pile up."""
    case = storage(1, 2, 300, k_dim=64)
    mine, exact = torch.zeros(case.positions.shape), torch.zeros(case.positions.shape)
    for step in range(40):
        q = query(case, 8, seed=step)
        decode(q, case, mine, statistics_decay=0.99)
        expect(q, case, exact, statistics_decay=0.99)
    torch.testing.assert_close(mine, exact, rtol=2e-4, atol=1e-6)


# --- every kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("k_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("v_dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes(backend, dtype, k_dim, v_dim):
    case = storage(1, 2, 150, k_dim=k_dim, v_dim=v_dim, dtype=dtype)
    q = query(case, 5)
    got = decode(q, case, plan=plan(case.counts, 3, backend))
    assert_attention(got, expect(q, case), q, logit_error(q, case, {"scale": k_dim**-0.5}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 256, 72])
@pytest.mark.parametrize("group", [1, 2, 7, 8, 9, 16, 17, 40, 64, 65, 71, 130])
def test_groups(backend, dtype, dim, group):
    """Heads of a group in one tile, in several, divided among the warps, in several passes."""
    case = storage(1, 2, 130, k_dim=dim, dtype=dtype)
    q = query(case, group)
    mine, theirs = (torch.zeros(case.positions.shape) for _ in range(2))
    call = {"sinks": torch.randn(2 * group), "plan": plan(case.counts, 3, backend)}
    got, want = decode(q, case, mine, **call), expect(q, case, theirs, **call)
    assert_attention(got, want, q, logit_error(q, case, {"scale": dim**-0.5}))
    assert_close(mine, theirs, statistics_error(2e-5, case, backend), "statistics")


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 24, 32, 40, 64, 100])
def test_page_sizes(backend, page_size):
    case = storage(2, 2, 203, page_size=page_size)
    q = query(case, 4)
    got = decode(q, case, plan=plan(case.counts, 5, backend))
    assert_attention(got, expect(q, case), q, 2e-5)
    pages = -(-203 // page_size)
    call = {"index": torch.randperm(pages)[: pages // 2 + 1].int().expand(2, 1, -1).contiguous(), "index_pages": True}
    call["index_counts"] = torch.full((2, 1), pages // 2 + 1, dtype=torch.int32)
    got, want = decode(q, case, **call), expect(q, case, **call)
    assert_attention(got, want, q, 2e-5)


@pytest.mark.emulated
@pytest.mark.parametrize("kilobytes", [48, 99, 163, 227])
@pytest.mark.parametrize(("dim", "group", "dtype"), [(128, 8, HALF[0]), (256, 4, HALF[1]), (256, 20, torch.float32)])
def test_devices_with_less_shared_memory(monkeypatch, kilobytes, dim, group, dtype):
    monkeypatch.setenv("KVCACHE_EMULATED_SHARED", str(kilobytes * 1024))
    case = storage(1, 2, 170, k_dim=dim, dtype=dtype)
    q = query(case, group)
    with use("emulated"):
        if kilobytes == 48 and dtype == torch.float32:  # no device has as little
            with pytest.raises(RuntimeError, match="decode_attention"):
                decode(q, case)
            return
        got = decode(q, case)
    assert_attention(got, expect(q, case), q, 2e-5)


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 4])
def test_listed_slots_that_a_head_lacks_are_ignored(backend, group):
    """One list for heads of different lengths."""
    case = storage(1, 2, 90, k_dim=64)
    case.counts[0] = ints([90, 20])
    call = {"index": ints([[[85, 3, 19, 40, 20]]]), "index_counts": ints([[5]])}
    q = query(case, group)
    mine, theirs = torch.ones(case.positions.shape), torch.ones(case.positions.shape)
    got, want = decode(q, case, mine, **call), expect(q, case, theirs, **call)
    assert_attention(got, want, q, 2e-5)
    assert_close(mine, theirs, statistics_error(2e-5, case, backend), "statistics")


def test_listed_pages_are_their_slots(backend):
    case = storage(2, 2, 300, k_dim=64)
    case.counts[0, 0] = 37
    q = query(case, 4)
    pages = ints([[[2, 0], [18, 7]], [[3, 1], [0, 18]]])
    slots = (pages[..., None] * 16 + torch.arange(16, dtype=torch.int32)).flatten(2)
    n = (torch.minimum(slots + 1, case.counts[..., None]) == slots + 1).sum(-1).int()
    slots = torch.stack(
        [torch.cat([x[x < c], x[x >= c] * 0 - 1]) for x, c in zip(slots.flatten(0, 1), case.counts.flatten())]
    ).view(slots.shape)
    by_pages = decode(q, case, index=pages, index_counts=torch.full((2, 2), 2, dtype=torch.int32), index_pages=True)
    by_slots = decode(q, case, index=slots, index_counts=n)
    for a, b in zip(by_pages, by_slots):
        torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2.0**-7)


def test_uniform_attention_by_hand(backend):
    """A zero query weighs all entries equally: the mean of the values, and statistics of one over their number."""
    case = storage(1, 1, 100, k_dim=64)
    case.v_pages.fill_(2.0)
    q = torch.zeros(1, 4, 64).bfloat16()
    statistics = torch.full(case.positions.shape, 8.0)
    out, lse = decode(q, case, statistics, plan=plan(case.counts, 2, backend), statistics_decay=0.25)
    assert (out == 2.0).all()
    torch.testing.assert_close(lse, torch.full((1, 4), math.log(100)))
    torch.testing.assert_close(statistics[..., :100], torch.full((1, 1, 100), 2.01), rtol=1e-5, atol=0)
    assert (statistics[..., 100:] == 8.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 700, 1000, 1023, 1024])
def test_pieces_in_which_nothing_is_seen(backend, dtype, first):
    """A window hides whole pieces of a long row, up to all of them: no NaN, no mass where nothing was seen."""
    case = storage(1, 1, 1024, k_dim=64, dtype=dtype)
    q = query(case, 4)
    statistics = torch.full(case.positions.shape, 2.0)
    call = {"window_start": ints([first]), "plan": plan(case.counts, 5, backend)}
    out, lse = decode(q, case, statistics, statistics_decay=0.5, **call)
    assert_attention((out, lse), expect(q, case, **call), q, 2e-5)
    assert bool((lse == float("-inf")).all()) == (first == 1024)
    assert (statistics[..., :first] == 1.0).all()
    mass = float(statistics[..., first:1024].sum()) - (1024 - first)
    assert abs(mass - (first < 1024)) < 2e-3
