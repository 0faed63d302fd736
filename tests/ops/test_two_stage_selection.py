"""Selection in two stages: the exact one when all pages are on the shortlist, measured against it otherwise."""

import pytest
import torch
from attention_case import calls, ints, queries
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, make_paged
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference
from kvcache.ops.two_stage import selection_recall, two_stage_selection


def bounds_of(case):
    bounds = torch.full((case.k_pages.shape[0], 2, case.k_pages.shape[2]), NAN, dtype=case.k_pages.dtype)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    return bounds


def exact(q, case, first, end, scale, k, width, soft=True, per_head=False):
    lists = case.table.shape[1] if per_head else 1
    scores = ops.selection_scores(q, case.k_pages, *case.args[2:5], first, end, scale, soft, per_head)
    best = torch.full((q.shape[0], lists), k, dtype=torch.int32)
    return ops.topk(scores, case.counts[:, :lists], case.positions[:, :lists], best, first, end, width)


def topics(tokens, *, rows=1, heads=2, dim=64, page_size=16, dtype=torch.bfloat16, spread=0.3, seed=0):
    """Keys as a text gives them: stretches of about 60 tokens about one thing, whose keys lie close together."""
    g = torch.Generator().manual_seed(seed)
    case = make_paged(
        rows=rows, heads=heads, page_size=page_size, k_dim=dim, v_dim=dim, dtype=dtype, max_count=0, room=tokens + 3
    )
    topic = (torch.arange(tokens) + torch.randint(0, 60, (), generator=g)) // 60
    centres = torch.randn(rows, heads, int(topic.max()) + 1, dim, generator=g)
    k = centres[:, :, topic] + spread * torch.randn(rows, heads, tokens, dim, generator=g)
    v = torch.randn(rows, heads, tokens, dim, generator=g)
    reference.append(*case.args, k, v, torch.arange(tokens, dtype=torch.int32).expand(rows, tokens).contiguous())
    return case, centres, g


@given(data=st.data(), same_entries=st.booleans())
@settings(max_examples=examples(60))
def test_a_shortlist_of_all_pages_is_the_exact_selection(backend, data, same_entries):
    case, query_heads, g = data.draw(calls(same_entries=same_entries))
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    rows, _, columns = case.table.shape
    capacity = case.positions.shape[2]
    per_head = not same_entries or data.draw(st.booleans(), "per head")
    soft, k = data.draw(st.booleans(), "soft"), data.draw(st.integers(0, 40), "k")
    first, end = (torch.randint(-3, 2 * capacity + 2, (rows,), generator=g, dtype=torch.int32) for _ in range(2))
    args = (q, case, first // 4, end, 0.2, k)
    want, want_counts = exact(*args, capacity, soft, per_head)
    pages = columns + data.draw(st.integers(0, 2), "more")
    got, got_counts = two_stage_selection(
        q, case.k_pages, bounds_of(case), *case.args[2:5], first // 4, end, 0.2, k, max(pages, 1), soft=soft,
        per_head=per_head,
    )  # fmt: skip
    assert torch.equal(got_counts, want_counts)
    assert torch.equal(got, want)
    assert (selection_recall(got, got_counts, want, want_counts) == 1).all()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_recall_where_keys_lie_in_clusters(backend, per_head, dtype, record_property):
    """An eighth of the pages, queries about three of the topics: nearly all of the exact selection, also of candidates
    alone; pages at random find their share of it."""
    tokens, k = 4000, 128
    case, centres, g = topics(tokens, rows=2, dtype=dtype)
    group = 4
    about = torch.tensor([7, 31, 52])
    q = centres[:, :, about].mean(2)[:, :, None] + 0.1 * torch.randn(2, 2, group, 64, generator=g)
    q = q.flatten(1, 2).to(dtype)
    first, end = ints([4, 4]), ints([tokens - 64] * 2)
    columns = case.table.shape[2]
    want, want_counts = exact(q, case, first, end, 0.5, k, k + 80, per_head=per_head)
    bounds = bounds_of(case)
    bounds[~torch.isin(torch.arange(len(bounds)), case.table[..., : -(-tokens // 16)])] = NAN
    index, counts = two_stage_selection(
        q, case.k_pages, bounds, *case.args[2:5], first, end, 0.5, k, columns // 8, per_head=per_head, width=k + 80
    )
    assert torch.equal(counts, want_counts)
    recall = selection_recall(index, counts, want, want_counts)
    of_candidates = selection_recall(index, counts, want, want_counts, case.positions, first, end)
    record_property("recall", of_candidates.tolist())
    print("recall", recall.tolist(), "of the candidates", of_candidates.tolist())
    assert (of_candidates <= recall).all()
    assert of_candidates.min() > 0.95

    shuffled = torch.randperm(columns - 5, generator=g)[: columns // 8].sort().values.int()
    pages = shuffled.expand(*want.shape[:2], -1).contiguous()
    scores = ops.selection_scores(
        q, case.k_pages, *case.args[2:5], first, end, 0.5, True, per_head, pages,
        torch.full(pages.shape[:2], columns // 8, dtype=torch.int32),
    )  # fmt: skip
    lists = pages.shape[1]
    chance = ops.topk(
        scores, case.counts[:, :lists], case.positions[:, :lists], torch.full(pages.shape[:2], k).int(), first, end,
        k + 80, pages, torch.full(pages.shape[:2], columns // 8, dtype=torch.int32), 16,
    )  # fmt: skip
    by_chance = selection_recall(*chance, want, want_counts, case.positions, first, end)
    assert by_chance.max() < 0.5


def test_protected_entries_are_always_selected(backend):
    """Sinks and the local window, also where their keys score worst of all."""
    tokens = 500
    case, centres, _ = topics(tokens, dtype=torch.float32)
    q = torch.cat([centres[:, :, 4], centres[:, :, 4]], 1)
    for slots in (slice(0, 5), slice(tokens - 40, tokens)):
        for head in range(2):
            at = torch.arange(tokens)[slots]
            case.k_pages[case.table[0, head, at // 16].long(), at % 16] = -100 * centres[0, head, 4]
    first, end = ints([5]), ints([tokens - 40])
    index, counts = two_stage_selection(q, case.k_pages, bounds_of(case), *case.args[2:5], first, end, 0.2, 20, 8)
    chosen = index[0, 0, : int(counts)].tolist()
    assert set(range(5)) | set(range(tokens - 40, tokens)) < set(chosen)
    assert len(chosen) == 5 + 40 + 20
    assert index.shape == (1, 1, 8 * 16)
    assert (index[0, 0, len(chosen) :] == -1).all()


def test_attention_reads_the_selection(backend):
    """The whole chain: what decode attention returns over the selection is attention over just those entries."""
    case, centres, g = topics(700, dtype=torch.float32)
    q = centres[:, :, [3, 6]].flatten(1, 2) + 0.1 * torch.randn(1, 4, 64, generator=g)
    first, end = ints([4]), ints([668])
    index, counts = two_stage_selection(
        q, case.k_pages, bounds_of(case), *case.args[2:5], first, end, 0.3, 64, 12, width=128
    )
    nothing = (None, None, None)
    out, _ = ops.decode_attention(q, *case.args[:5], *nothing, index, counts, None, 0.3)
    slots = index[0, 0, : int(counts)].long()
    k, v = (x[case.table[0][:, slots // 16].long(), slots % 16] for x in (case.k_pages, case.v_pages))
    want = torch.softmax(q.view(2, 2, 64) @ k.transpose(1, 2) * 0.3, -1) @ v
    torch.testing.assert_close(out, want.view(1, 4, 64), rtol=1e-5, atol=1e-5)


def test_k_per_row_and_ragged_lengths(backend):
    """k as a tensor; an empty row and one shorter than a page beside a long one."""
    case = make_paged(rows=3, heads=1, page_size=16, k_dim=64, v_dim=1, max_count=0, room=300)
    case.counts[:] = ints([[300], [0], [7]])
    case.k_pages.copy_(torch.randn(case.k_pages.shape, generator=torch.Generator().manual_seed(0)))
    case.positions.copy_(torch.arange(case.positions.shape[2]))
    q = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    first, end = ints([0] * 3), ints([300, 0, 7])
    k = ints([[10], [10], [3]])
    _, counts = two_stage_selection(q, case.k_pages, bounds_of(case), *case.args[2:5], first, end, 0.1, k, 4)
    assert counts.tolist() == [[10], [0], [3]]


def test_recall_by_hand():
    index, counts = ints([[[1, 4, 9, 12, -1]], [[-1] * 5]]), ints([[4], [0]])
    wanted, wanted_counts = ints([[[1, 5, 9, 30]], [[2, 3, -1, -1]]]), ints([[4], [2]])
    assert selection_recall(index, counts, wanted, wanted_counts).tolist() == [[0.5], [0.0]]
    assert selection_recall(index, counts, wanted, ints([[1], [0]])).tolist() == [[1.0], [1.0]]
    # Of the candidates (positions 4 .. 19) the first list has 5 and 9, and 9 was found.
    positions = torch.arange(40, dtype=torch.int32).expand(2, 1, 40)
    recall = selection_recall(index, counts, wanted, wanted_counts, positions, ints([4, 4]), ints([20, 20]))
    assert recall.tolist() == [[0.5], [1.0]]
    assert selection_recall(index[..., :0], ints([[0], [0]]), wanted, wanted_counts).tolist() == [[0.0], [0.0]]


def test_nothing_depends_on_values_on_the_host():
    """Shapes come from shapes alone: it runs on tensors without values, as in a captured graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case, _, _ = topics(100)
    inputs = (torch.randn(1, 4, 64).bfloat16(), case.k_pages, bounds_of(case), *case.args[2:5], ints([4]), ints([90]))
    with FakeTensorMode() as mode:
        index, counts = two_stage_selection(*(mode.from_tensor(x) for x in inputs), 0.1, 10, 3)
    assert index.shape == (1, 1, 48)
    assert counts.shape == (1, 1)


def test_shortlist_needs_a_page():
    case, _, _ = topics(50)
    q = torch.randn(1, 4, 64).bfloat16()
    with pytest.raises(ValueError, match="shortlist_pages is 0, needs 1 or more"):
        two_stage_selection(q, case.k_pages, bounds_of(case), *case.args[2:5], ints([4]), ints([40]), 0.1, 10, 0)
