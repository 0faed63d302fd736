"""latent_attention (absorbed MLA) of every backend against the float64 reference, and the reference against torch."""

import pytest
import torch
from attention_case import assert_attention, assert_close, ints, statistics_error
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, bits, make_paged, strided
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference


def case_of(rows=1, latent=64, rope=16, max_count=40, dtype=torch.float32, page_size=16, room=0, seed=0, full=False):
    sizes = {"max_count": 0, "room": max_count} if full else {"max_count": max_count, "room": room}
    case = make_paged(
        rows=rows, heads=1, page_size=page_size, k_dim=latent, v_dim=rope, dtype=dtype, seed=seed, **sizes
    )
    if full:  # every row holds max_count entries, in order
        g = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(rows, 1, max_count, n, generator=g) for n in (latent, rope))
        with ops.use_backend("native"):
            ops.append(*case.args, k, v, torch.arange(max_count, dtype=torch.int32).repeat(rows, 1))
    return case


def queries(case, heads, tokens=1, dtype=None, size=1.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    rows, dtype = case.table.shape[0], dtype or case.k_pages.dtype
    parts = (torch.randn(rows, heads, tokens, x.shape[2], generator=g) * size for x in (case.k_pages, case.v_pages))
    return tuple(x.to(dtype) for x in parts)


def call(q, case, q_positions=None, window_start=None, statistics=None, **changes):
    scale = changes.pop("scale", (case.k_pages.shape[2] + case.v_pages.shape[2]) ** -0.5)
    return ops.latent_attention(*q, *case.args[:5], q_positions, window_start, statistics, scale, **changes)


def expect(q, case, q_positions=None, window_start=None, statistics=None, **changes):
    changes.pop("plan", None)
    scale = changes.pop("scale", (case.k_pages.shape[2] + case.v_pages.shape[2]) ** -0.5)
    wide = [x.double() for x in q]
    return reference.latent_attention(*wide, *case.args[:5], q_positions, window_start, statistics, scale, **changes)


def error_of(q, case, scale=None, softcap=0.0):
    dim = case.k_pages.shape[2] + case.v_pages.shape[2]
    scale = dim**-0.5 if scale is None else scale
    size = 4.0 * dim**0.5 * scale * max((float(x.float().abs().max()) for x in q if x.numel()), default=0.0)
    return 2e-5 + 4e-7 * (min(size, 4 * softcap) if softcap else size)


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.reference
def test_it_is_attention_over_the_expanded_keys_and_values():
    """Absorbing the up-projection changes the order of two sums, nothing else."""
    torch.manual_seed(0)
    heads, latent, rope, nope, value, n = 4, 24, 8, 12, 10, 30
    case = case_of(latent=latent, rope=rope, max_count=n, full=True)
    up_k, up_v = torch.randn(heads, nope, latent).double(), torch.randn(heads, value, latent).double()
    q_nope, q_rope = torch.randn(1, heads, 3, nope).double(), torch.randn(1, heads, 3, rope).double()
    c, r = (reference.gather_pages(x, case.table, case.counts, n).double() for x in (case.k_pages, case.v_pages))
    k = torch.cat([torch.einsum("hdl,rxnl->rhnd", up_k, c), r.expand(-1, heads, -1, -1)], -1)
    v = torch.einsum("hdl,rxnl->rhnd", up_v, c)
    reach = ints([[10, 20, 29]])
    seen = torch.arange(n) <= reach[0, :, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.cat([q_nope, q_rope], -1), k, v, attn_mask=seen, scale=0.3
    )
    absorbed = torch.einsum("rhtd,hdl->rhtl", q_nope, up_k)
    out, _ = reference.latent_attention(absorbed, q_rope, *case.args[:5], reach, None, None, 0.3)
    got = torch.einsum("rthl,hdl->rhtd", out, up_v)
    torch.testing.assert_close(got, want)


@pytest.mark.reference
def test_it_is_decode_attention_with_one_kv_head():
    """Of keys [latent | rope] and values [latent]: outputs, log-sum-exps and statistics."""
    case = case_of(rows=2, latent=24, rope=8, max_count=60, seed=3)
    q = queries(case, 5)
    start = ints([[20], [3]])
    joined = torch.cat([case.k_pages, case.v_pages], -1)
    mine, theirs = torch.rand(2, *case.positions.shape)
    theirs = mine.clone()
    out, lse = expect(q, case, None, start, mine, statistics_decay=0.5)
    want = reference.decode_attention(
        torch.cat(q, -1)[:, :, 0].double(), joined, case.k_pages, *case.args[2:5], start[:, 0].contiguous(), None, None,
        None, None, theirs, 32**-0.5, 0.0, 0.5,
    )  # fmt: skip
    torch.testing.assert_close(out[:, 0], want[0])
    torch.testing.assert_close(lse[:, 0], want[1])
    torch.testing.assert_close(mine, theirs)


# --- fuzzing ----------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=examples(120))
def test_fuzz(backend, data):
    draw = data.draw
    latent = draw(st.sampled_from((1, 7, 16, 32, 64, 100, 128, 256, 512, 512)), "latent")
    rope = draw(st.sampled_from((1, 5, 16, 32, 64, 64, 128)), "rope")
    rows, heads = draw(st.integers(1, 3), "rows"), draw(st.sampled_from((1, 2, 3, 8, 16, 20, 40, 70, 128)), "heads")
    tokens = draw(st.sampled_from((1, 1, 1, 2, 3, 9)), "tokens")
    case = case_of(
        rows, latent, rope, draw(st.sampled_from((0, 1, 15, 64, 65, 200, 700)), "count"),
        draw(st.sampled_from(STORAGE_DTYPES), "dtype"), draw(st.sampled_from((1, 3, 16, 64)), "page"),
        draw(st.sampled_from((0, 40)), "room"), draw(st.integers(0, 2**20), "seed"),
    )  # fmt: skip
    capacity = case.positions.shape[2]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20), "seed"))
    other = draw(st.sampled_from((None, None, torch.float32)), "q dtype")
    q = queries(case, heads, tokens, other, draw(st.sampled_from((1.0, 20.0)), "size"))
    if draw(st.booleans(), "strided"):
        q = tuple(strided(x) for x in q)
    options = {"scale": draw(st.sampled_from((0.05, 0.2)), "scale"), "softcap": draw(st.sampled_from((0.0, 20.0)))}
    reach = start = mine = theirs = None
    if draw(st.booleans(), "reach"):
        reach = torch.randint(-1, 2 * capacity + 2, (rows, tokens), generator=g, dtype=torch.int32)
    if draw(st.booleans(), "window"):
        start = torch.randint(0, 2 * capacity + 2, (rows, tokens), generator=g, dtype=torch.int32)
    error = error_of(q, case, options["scale"], options["softcap"])
    if tokens == 1 and draw(st.booleans(), "statistics"):
        mine = torch.randn(rows, 1, capacity, generator=g)
        dead = torch.arange(capacity) >= case.counts[..., None]
        mine[dead] = NAN
        theirs = mine.clone()
        options["statistics_decay"] = draw(st.sampled_from((1.0, 0.5, 0.0)), "decay")
        options["statistics_max"] = draw(st.booleans(), "max")
    before = case.clone()
    got = call(q, case, reach, start, mine, **options)
    want = expect(q, case, reach, start, theirs, **options)
    assert_attention(got, want, q[0], error)
    if mine is not None:
        assert_close(mine, theirs, statistics_error(error, case, backend), "statistics")
        assert torch.equal(bits(mine[dead]), bits(theirs[dead]))
    case.assert_equal(before)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("heads", [1, 8, 16, 128])
def test_the_sizes_of_deepseek(backend, dtype, heads):
    case = case_of(2, 512, 64, 300, dtype, full=True)
    q = queries(case, heads)
    mine, theirs = (torch.zeros(case.positions.shape) for _ in range(2))
    got, want = call(q, case, statistics=mine), expect(q, case, statistics=theirs)
    error = error_of(q, case)
    assert_attention(got, want, q[0], error)
    assert_close(mine, theirs, statistics_error(error, case, backend), "statistics")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 700, 1000, 1023, 1024])
def test_pieces_in_which_nothing_is_seen(backend, dtype, first):
    """A window hides whole pieces of a long row, up to all of them: no NaN, no mass where nothing was seen."""
    case = case_of(1, 64, 16, 1024, dtype, full=True)
    q = queries(case, 4)
    statistics = torch.full(case.positions.shape, 2.0)
    out, lse = call(q, case, window_start=ints([[first]]), statistics=statistics, statistics_decay=0.5)
    want, _ = expect(q, case, window_start=ints([[first]]))
    assert_close(out, want, 2e-5 + 2.0**-8, "out")
    assert out.isfinite().all()
    assert bool((lse == float("-inf")).all()) == (first == 1024)
    assert (statistics[..., :first] == 1.0).all()
    mass = float(statistics[..., first:1024].sum()) - (1024 - first)
    assert abs(mass - (first < 1024)) < 2e-3


def test_each_query_sees_what_came_before_it(backend):
    case = case_of(1, 32, 16, 50, full=True)
    q = queries(case, 3, tokens=4)
    out, lse = call(q, case, ints([[0, 7, -1, 49]]))
    for t, reach in ((0, 0), (1, 7), (3, 49)):
        alone, level = call(tuple(x[:, :, t : t + 1].contiguous() for x in q), case, ints([[reach]]))
        torch.testing.assert_close(out[:, t], alone[:, 0])
        torch.testing.assert_close(lse[:, t], level[:, 0])
    assert (out[:, 2] == 0).all()  # padding
    assert (lse[:, 2] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_query_rows_than_one_launch_takes(backend, dtype):
    case = case_of(2, 32, 16, 150, dtype, full=True)
    q = queries(case, 100, tokens=6)
    reach = ints([[0, 20, 149, -1, 80, 3], [5, 149, 70, 71, 72, 140]])
    start = (reach - 40).clamp(min=0)
    assert_attention(call(q, case, reach, start), expect(q, case, reach, start), q[0], error_of(q, case))


def test_uniform_attention_by_hand(backend):
    """A zero query weighs all entries equally: the mean of the latents, and statistics of one over their number."""
    case = case_of(1, 64, 16, 100, torch.bfloat16, full=True)
    case.k_pages.fill_(2.0)
    q = tuple(torch.zeros_like(x) for x in queries(case, 4))
    statistics = torch.full(case.positions.shape, 8.0)
    out, lse = call(q, case, statistics=statistics, statistics_decay=0.25)
    assert (out == 2.0).all()
    torch.testing.assert_close(lse, torch.full((1, 1, 4), 100.0).log())
    torch.testing.assert_close(statistics[..., :100], torch.full((1, 1, 100), 2.01), rtol=1e-5, atol=0)
    assert (statistics[..., 100:] == 8.0).all()


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 24])
def test_plans(backend, workers):
    if backend in ("reference", "cpu"):
        pytest.skip("plans are for GPUs")
    case = case_of(3, 128, 32, 500, torch.bfloat16, seed=5)
    q = queries(case, 20)
    plan = ops.plan_decode(case.counts[None].contiguous(), 0, 500, workers)[0]
    mine, theirs = (torch.zeros(case.positions.shape) for _ in range(2))
    got, want = call(q, case, statistics=mine, plan=plan), expect(q, case, statistics=theirs)
    assert_attention(got, want, q[0], 2e-5)
    assert_close(mine, theirs, statistics_error(2e-5, case, backend), "statistics")


def test_nothing_to_do(backend):
    case = case_of(2, 16, 8, 0)
    out, lse = call(queries(case, 4), case)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    empty = queries(case, 4, tokens=0)
    assert call(empty, case)[0].shape == (2, 0, 4, 16)


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_give_the_same(threads):
    case = case_of(1, 64, 16, 3000, torch.bfloat16, full=True)
    q = queries(case, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mine, theirs = (torch.zeros(case.positions.shape) for _ in range(2))
        assert_attention(call(q, case, statistics=mine), expect(q, case, statistics=theirs), q[0], 2e-5)
        assert_close(mine, theirs, 2e-5, "statistics")
    finally:
        torch.set_num_threads(before)
