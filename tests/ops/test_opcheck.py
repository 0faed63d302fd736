"""torch.library.opcheck and torch.compile over every op: schema, mutation annotations, fake kernels."""

import pytest
import torch
from paged_case import make_paged
from torch.utils._pytree import tree_map_only

from kvcache import ops

pytestmark = pytest.mark.cpu
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def case_of(**changes):
    settings = {"rows": 2, "heads": 2, "page_size": 4, "k_dim": 8, "v_dim": 6, "max_count": 12, "room": 8, "seed": 7}
    case = make_paged(**settings | changes)
    for x in (case.k_pages, case.v_pages, case.columns):
        x.nan_to_num_(0.0)  # opcheck compares with ==
    return case


def selection_state():
    """Of two rows, the first of which has a list: query, index, index_counts, until, at, events."""
    index = ints([[[0, 1, 2, 0, 0, 0]], [[0, 0, 0, 0, 0, 0]]])
    return torch.randn(2, 4, 8), index, ints([[3], [0]]), ints([3, 0]), ints([2, 0]), ints([0, 0])


def samples():
    """name -> (args, kwargs) of one or more calls."""
    case, twin = case_of(), case_of(same_counts=True)
    capacity = case.positions.shape[2]
    k, v = torch.randn(2, 2, 3, 8).bfloat16(), torch.randn(2, 2, 3, 6)
    new_positions = ints([[30, 31, -1], [40, 41, 42]])
    keep = torch.full((2, 2, 5), -1, dtype=torch.int32)
    keep[..., 0] = 0
    keep_counts = case.counts.clamp(max=1)
    q, q_positions = torch.randn(2, 4, 3, 8), ints([[-1, 10, 11], [9, 10, 11]])
    index, index_counts = keep, keep_counts
    first, end = ints([1, 2]), ints([20, 30])
    limits = (case.counts // 2, first, end)
    shared = (case.k_pages, case.v_pages, case.table, case.counts, case.positions)
    keys = (case.k_pages, case.table, case.counts, case.positions)
    extras = (q_positions - 5, torch.randn(4), torch.randn(2, 4, capacity))
    mask = torch.rand(2, 1, 3, capacity) < 0.7
    statistics = torch.rand(2, 2, capacity)
    lse = torch.randn(2, 4, 3)
    bounds = torch.randn(max(len(case.k_pages), len(twin.k_pages)), 2, 8)
    pages = torch.where(case.counts > 0, 0, -1).int()[..., None]
    latent = case_of(heads=1)
    absorbed = (torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 6), *latent.args[:5])
    mass = torch.rand(latent.positions.shape)
    return {
        "append": [
            ((*case.args, k, v, new_positions),),
            ((*case.args, k, v, new_positions, torch.randn(1, 2, 2, 3), bounds[: len(case.k_pages)].clone()),),
        ],
        "copy_pages": [
            ((case.k_pages, case.v_pages, ints([0, 1]), ints([2, 3])),),
            ((case.k_pages, case.v_pages, ints([0, 1]), ints([2, 3]), bounds[: len(case.k_pages)].clone()),),
        ],
        "compact": [
            ((*case.args[:3], case.table.clone(), *case.args[3:], keep, keep_counts, *extra),)
            for extra in ((), (bounds[: len(case.k_pages)].clone(),))
        ],
        "overwrite": [
            ((*case.args, case.counts.clamp(max=1) - 1, *extra),)
            for extra in ((), (bounds[: len(case.k_pages)].clone(),))
        ],
        "prefill_attention": [
            ((q, *shared, q_positions, None, None, None, None, None, None, 0.4),),
            ((q, *shared, q_positions, *extras, mask, index, index_counts, 0.4, 20.0),),
        ],
        "decode_attention": [
            ((q[:, :, 0], *shared, None, None, None, None, None, None, 0.4),),
            ((q[:, :, 0], *shared, first, *extras[1:], index, index_counts, statistics, 0.4, 20.0, 0.9, True),),
        ],
        "latent_attention": [
            ((*absorbed, None, None, None, 0.4),),
            ((*absorbed, q_positions[:, -1:].contiguous(), None, mass, 0.4, 20.0, 0.9, True),),
        ],
        "column_sums": [
            ((q, *keys, q_positions, lse, None, None, None, 0.4),),
            ((q, *keys, q_positions, lse, extras[0], extras[2], mask, 0.4, 20.0, 2, True),),
        ],
        "selection_scores": [
            ((q[:, :, 0], *keys, first, end, 0.4, True, True),),
            ((q[:, :, 0], twin.k_pages, twin.table, twin.counts, twin.positions, first, end, 0.4, False),),
            ((q[:, :, 0], *keys, first, end, 0.4, True, True, pages, pages[..., 0] + 1),),
        ],
        "page_scores": [
            ((q[:, :, 0], bounds, *keys[1:], first, end, 0.4, True, True),),
            ((q[:, :, 0], bounds, twin.table, twin.counts, twin.positions, first, end, 0.4, False),),
        ],
        "query_similarity": [((q[:, :, 0], q[:, :, 1].bfloat16()),)],
        "select_tokens": [
            ((q[:, :, 0], twin.k_pages, twin.table, twin.counts, twin.positions, ints([20, 30]), *angles, *state),)
            for angles, state in (
                ((None, None, None), (*selection_state(), 1, 1, 2, 0.5)),
                (
                    (torch.rand(2, 3), torch.rand(2, 3), bounds[: len(twin.k_pages)].clone()),
                    (*selection_state(), 1, 1, 2, -1.0, 0.5, False, 2),
                ),
            )
        ],
        "topk": [
            ((case.columns[0], case.counts, case.positions, case.counts // 2, first, end, capacity),),
            ((q[:, :2, 0, :4], case.counts, case.positions, case.counts, first, end, 4, pages, pages[..., 0] + 1, 4),),
        ],
        "choose_victims": [
            ((case.columns[0], case.counts, case.positions, case.counts // 2, first, end),),
            ((None, case.counts, case.positions, case.counts // 2, first, end),),
        ],
        "evict": [
            ((*case.args[:2], *([x] for x in case.args[2:]), [scores], *([x] for x in limits), *extra),)
            for scores, extra in ((torch.rand(2, 2, capacity), ()), (None, (bounds[: len(case.k_pages)].clone(),)))
        ],
        "page_bounds": [((case.k_pages, case.table, case.counts, bounds[: len(case.k_pages)].clone()),)],
        "plan_decode": [((case.counts[None], 1, 40, 3),)],
        "active_rows": [((torch.tensor([True, False, True]),),)],
        "gather_rows": [((q[0, 0], ints([2, -1])),)],
        "scatter_rows": [((q[0, 0].clone(), torch.zeros(2, 8), ints([2, -1])),)],
    }


ALL_OPS = sorted(samples())


def test_samples_cover_every_op():
    assert sorted(ops.OPS) == ALL_OPS


@pytest.mark.parametrize("name", ALL_OPS)
def test_opcheck(name):
    torch.manual_seed(0)
    for (args,) in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.kvcache, name).default, args, test_utils=OPCHECKS)


def test_opcheck_of_a_plan_whose_size_only_the_device_knows():
    counts = ints([[[5, 0], [7, 300]]])
    torch.library.opcheck(torch.ops.kvcache.plan_decode.default, (counts, 1, 400), test_utils=OPCHECKS)


@pytest.mark.parametrize("name", ALL_OPS)
def test_fake_outputs_have_the_real_ones_layout(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for (args,) in samples()[name]:
        real = getattr(ops, name)(*args)
        with FakeTensorMode() as mode:
            fake = getattr(ops, name)(*(tree_map_only(torch.Tensor, mode.from_tensor, x) for x in args))
        real, fake = ((x if isinstance(x, tuple) else (x,)) for x in (real, fake))
        for a, b in zip(real, fake):
            if a is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("compiled_backend", ["aot_eager"])
def test_evicting_all_layers_compiles_as_one_graph(compiled_backend):
    def step(budgets, first, end, k_pages, v_pages, *lists):
        ops.evict(k_pages, v_pages, *lists, [x[0] for x in lists[3]], budgets, first, end)
        return lists[1][0] * 2

    plain, compiled = case_of(), case_of()
    run = torch.compile(step, fullgraph=True, backend=compiled_backend)
    rest = ([plain.counts // 2] * 2, [ints([0, 0])] * 2, [ints([1000, 1000])] * 2)
    got, want = (
        f(*rest, *x.args[:2], *([y, y.clone()] for y in x.args[2:])) for f, x in ((run, compiled), (step, plain))
    )
    assert torch.equal(got, want)
    compiled.assert_equal(plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_backend", ["aot_eager"])
def test_a_step_compiles_as_one_graph(compiled_backend):
    """append, attention with statistics, victims, overwrite: what a layer does in a decode step."""

    def step(q, k, v, new_positions, budgets, first, end, *storage):
        k_pages, v_pages, table, counts, positions, columns = storage
        ops.append(*storage, k, v, new_positions)
        shared = (k_pages, v_pages, table, counts, positions)
        out, _ = ops.decode_attention(q, *shared, None, None, None, None, None, columns[0], 0.35)
        victims = ops.choose_victims(columns[0], counts, positions, budgets, first, end)
        ops.overwrite(*storage, victims)
        return out * 2

    torch.manual_seed(0)
    plain, compiled = case_of(), case_of()
    run = torch.compile(step, fullgraph=True, backend=compiled_backend)
    budgets, first, end = plain.counts.clone(), ints([0, 0]), ints([1000, 1000])
    for i in range(2):
        args = (torch.randn(2, 4, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 6), ints([[50 + i], [60 + i]]))
        rest = (budgets, first, end)
        assert torch.equal(run(*args, *rest, *compiled.args), step(*args, *rest, *plain.args))
        compiled.assert_equal(plain)
    torch._dynamo.reset()
