"""One small call of every op against the reference; run by tests in subprocesses with other settings."""

import torch
from paged_case import STORAGE_DTYPES, make_paged

from kvcache import ops
from kvcache.ops import reference


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def check(name, got, want):
    for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
        if a is not None:
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if a.element_size() == 2 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance, msg=lambda text: f"{name}: {text}")


def run_every_op():
    """Raises AssertionError where an op and the reference differ."""
    for dtype in STORAGE_DTYPES:
        torch.manual_seed(0)
        case = make_paged(
            rows=2, heads=2, page_size=4, k_dim=40, v_dim=24, dtype=dtype, max_count=70, room=5, same_counts=True,
        )  # fmt: skip
        twin = case.clone()
        capacity = case.positions.shape[2]

        def both(name, *rest, mine, theirs):
            check(name, getattr(ops, name)(*mine, *rest), getattr(reference, name)(*theirs, *rest))
            case.assert_equal(twin)  # noqa: B023

        new = (torch.randn(2, 2, 5, 40), torch.randn(2, 2, 5, 24), ints([[-1, 200, 201, 202, 203]] * 2))
        both("append", *new, mine=case.args, theirs=twin.args)
        both("copy_pages", ints([0]), ints([1]), mine=case.args[:2], theirs=twin.args[:2])
        case.k_pages.nan_to_num_(0.0)
        case.v_pages.nan_to_num_(0.0)
        first, end = ints([1, 0]), ints([150, 190])
        q, q_positions = torch.randn(2, 4, 5, 40).to(dtype), ints([[-1, 200, 201, 202, 203]] * 2)
        read, keys = case.args[:5], (case.args[0], *case.args[2:5])
        none = (None,) * 6
        attention = (q, *read, q_positions, *none, 0.2)
        check("prefill_attention", ops.prefill_attention(*attention), reference.prefill_attention(*attention))
        lse = reference.prefill_attention(*attention)[1]
        sums = (q, *keys, q_positions, lse, None, None, None, 0.2)
        check("column_sums", ops.column_sums(*sums), reference.column_sums(*sums))
        query = q[:, :, 0]
        statistics = [torch.rand(2, 2, capacity)] * 2
        statistics[1] = statistics[0].clone()
        got = ops.decode_attention(query, *read, first, *none[:4], statistics[0], 0.2)
        want = reference.decode_attention(query, *read, first, *none[:4], statistics[1], 0.2)
        check("decode_attention", (*got, statistics[0]), (*want, statistics[1]))
        selection = (query, *keys, first, end, 0.2)
        check("selection_scores", ops.selection_scores(*selection), reference.selection_scores(*selection))
        ranked = (case.columns[0], case.counts, case.positions, case.counts // 2, first, end)
        kept = reference.topk(*ranked, capacity)
        check("topk", ops.topk(*ranked, capacity), kept)
        check("choose_victims", ops.choose_victims(*ranked), reference.choose_victims(*ranked))
        twin.k_pages.copy_(case.k_pages)
        twin.v_pages.copy_(case.v_pages)
        # Two layers, of which the second gives nothing up: once by score, once the oldest.
        for scores in ([case.columns[0].clone(), None], []):
            lists = [[[x, x.clone()] for x in storage.args[2:]] for storage in (case, twin)]
            limits = ([case.counts - 1, case.counts + 9], [first, first], [end, end])
            both("evict", scores, *limits, mine=(*case.args[:2], *lists[0]), theirs=(*twin.args[:2], *lists[1]))
        both("overwrite", ints([[0, -1], [1, 2]]), mine=case.args, theirs=twin.args)
        few = (kept[0][..., :3].contiguous(), kept[1].clamp(max=2))
        for storage, compact in ((case, ops.compact), (twin, reference.compact)):
            compact(*storage.args[:3], storage.table, *storage.args[3:], *few)
        case.assert_equal(twin)
