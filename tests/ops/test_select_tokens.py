"""select_tokens against the ops that it is made of, row by row; what rows that go on with their list must not feel."""

import pytest
import torch
from attention_case import calls, ints, queries
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, make_paged
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference
from kvcache.ops.two_stage import two_stage_selection

STATE = ("query", "index", "index_counts", "until", "at", "events")


def turn(q, cos, sin):
    half = cos.shape[1]
    a, b, c, s = q[..., :half].float(), q[..., half : 2 * half].float(), cos[:, None], sin[:, None]
    return torch.cat([(a * c - b * s).to(q.dtype), (b * c + a * s).to(q.dtype), q[..., 2 * half :]], -1)


def bounds_of(case):
    bounds = torch.full((case.k_pages.shape[0], 2, case.k_pages.shape[2]), NAN, dtype=case.k_pages.dtype)
    reference.page_bounds(case.k_pages, case.table, case.counts, bounds)
    return bounds


def state_of(q, width, g, rows, held):
    """Lists of some length, of rows that chose at some time or never."""
    until = (held - torch.randint(-1, 4, (rows,), generator=g)).clamp(min=0).int()
    listed = torch.minimum(until, torch.randint(0, width + 1, (rows,), generator=g)).int()
    index = torch.full((rows, 1, width), -7, dtype=torch.int32)
    for r in range(rows):
        n = int(listed[r])
        index[r, 0, :n] = torch.randperm(int(until[r]), generator=g)[:n].sort().values.int()
    at = (until - torch.randint(0, 6, (rows,), generator=g)).clamp(min=0).int()
    return {
        "query": torch.randn(q.shape, generator=g).to(q.dtype),
        "index": index,
        "index_counts": listed[:, None].contiguous(),
        "until": until,
        "at": at,
        "events": torch.randint(0, 9, (2,), generator=g).int(),
    }


def wanted(q, case, q_positions, angles, bounds, state, sinks, k, local, reuse, scale, soft, shortlist):
    """The state afterwards, by the ops that the step is made of; also which rows chose anew."""
    state = {name: x.clone() for name, x in state.items()}
    held, width = case.counts[:, 0], state["index"].shape[2]
    plain = q if angles is None else turn(q, *angles)
    large = (q_positions >= 0) & (held > sinks + k + local)
    anew = (state["at"] <= 0) | (ops.query_similarity(plain, state["query"]) < reuse)
    anew |= state["index_counts"][:, 0] + held - state["until"] > width
    if reuse > -1:
        anew |= held - state["at"] > local
    anew &= large
    first = torch.full_like(held, sinks)
    end = (q_positions + 1 - local).clamp(min=sinks)
    keys = (case.k_pages, case.table, case.counts, case.positions)
    best = torch.full((len(held), 1), k, dtype=torch.int32)
    if bounds is None:
        scores = ops.selection_scores(q, *keys, first, end, scale, soft)
        index, index_counts = ops.topk(
            scores, case.counts[:, :1], case.positions[:, :1], best, first, end, case.positions.shape[2]
        )
    else:
        index, index_counts = two_stage_selection(
            q, case.k_pages, bounds, *keys[1:], first, end, scale, best, shortlist, soft=soft
        )
    for r in range(len(held)):
        if anew[r]:
            n = int(index_counts[r, 0])
            state["index"][r, 0] = -1
            state["index"][r, 0, :n] = index[r, 0, :n]
            state["index_counts"][r] = n
            state["query"][r] = plain[r]
            state["until"][r] = state["at"][r] = held[r]
            continue
        n, grown = int(state["index_counts"][r, 0]), int(held[r] - state["until"][r])
        grown = max(min(grown, width - n), -n)
        for i in range(grown):
            state["index"][r, 0, n + i] = state["until"][r] + i
        state["index_counts"][r] += grown
        state["until"][r] += grown
    state["events"] += ints([int(anew.sum()), int((large & ~anew).sum())])
    return state, anew


@given(data=st.data())
@settings(max_examples=examples(60))
def test_a_step_is_what_its_parts_say(backend, data):
    case, query_heads, g = data.draw(calls(same_entries=True))
    q = queries(data, case, query_heads, 1, g)[:, :, 0]
    rows, dim, held = q.shape[0], q.shape[2], case.counts[:, 0]
    # Slots of a row that has lost nothing hold ascending positions; a schedule leaves holes.
    steps = torch.randint(1, data.draw(st.integers(2, 4), "holes"), case.positions[:, :1].shape, generator=g)
    case.positions.copy_(steps.cumsum(-1) - 1)
    last = case.positions[:, 0].gather(1, (held - 1).clamp(min=0)[:, None].long())[:, 0] if held.max() > 0 else held
    q_positions = torch.where((held > 0) & (torch.rand(rows, generator=g) < 0.8), last, -1).int()
    sinks, k, local = (
        data.draw(st.integers(*x), n) for n, x in (("sinks", (0, 9)), ("k", (1, 40)), ("local", (1, 30)))
    )
    width = sinks + k + local + data.draw(st.integers(0, 30), "room")
    state = state_of(q, width, g, rows, held)
    angles = None
    if data.draw(st.booleans(), "rotation") and dim > 1:
        angle = 100 * torch.rand(rows, data.draw(st.integers(1, dim // 2), "half"), generator=g)
        angles = angle.cos(), angle.sin()
    near = torch.rand(rows, generator=g) < 0.5  # of these rows the query is much like the one before
    plain = q if angles is None else turn(q, *angles)
    state["query"] = torch.where(near[:, None, None], (plain.float() * 1.25).to(q.dtype), state["query"])
    bounds, shortlist = None, 0
    if data.draw(st.booleans(), "two stages"):
        pages = -(-(sinks + k + local) // case.page_size) + 3
        bounds, shortlist = bounds_of(case), pages + data.draw(st.integers(0, 5), "shortlist")
    rule = (sinks, k, local, data.draw(st.sampled_from((-1.0, 0.3, 0.9, 2.0)), "reuse"))
    rule += (data.draw(st.sampled_from((1.0, 0.2)), "scale"), data.draw(st.booleans(), "soft"), shortlist)
    want, anew = wanted(q, case, q_positions, angles, bounds, state, *rule)
    got = {name: x.clone() for name, x in state.items()}
    before = case.clone()
    ops.select_tokens(
        q,
        case.k_pages,
        *case.args[2:5],
        q_positions,
        *(angles or (None, None)),
        bounds,
        *(got[n] for n in STATE),
        *rule,
    )
    case.assert_equal(before)
    for name in STATE[1:]:
        assert torch.equal(got[name], want[name]), name
    error = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[q.dtype]
    torch.testing.assert_close(got["query"].float(), want["query"].float(), rtol=error, atol=error * 30)
    assert torch.equal(got["query"][~anew], state["query"][~anew])


def filled(tokens, rows=1, dtype=torch.bfloat16, dim=64, seed=0):
    case = make_paged(
        rows=rows, heads=2, page_size=16, k_dim=dim, v_dim=dim, dtype=dtype, max_count=0, room=tokens + 24, seed=seed
    )
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(rows, 2, tokens, dim, generator=g) for _ in range(2))
    reference.append(*case.args, k, v, torch.arange(tokens, dtype=torch.int32).expand(rows, tokens).contiguous())
    return case, g


def empty_state(q, width):
    rows = q.shape[0]
    none = torch.zeros(rows, dtype=torch.int32)
    return {
        "query": torch.zeros_like(q),
        "index": torch.full((rows, 1, width), -1, dtype=torch.int32),
        "index_counts": none[:, None].clone(),
        "until": none.clone(),
        "at": none.clone(),
        "events": ints([0, 0]),
    }


@pytest.mark.parametrize("shortlist", [0, 30])
def test_a_list_grows_until_the_window_has_passed_or_the_query_turns(backend, shortlist):
    sinks, k, local = 4, 20, 16
    case, g = filled(200)
    q = torch.randn(1, 4, 64, generator=g).bfloat16()
    state = empty_state(q, sinks + k + 2 * local)
    bounds = bounds_of(case) if shortlist else None

    def step(query):
        position = int(case.counts[0, 0])
        new = torch.randn(1, 2, 1, 64, generator=g)
        reference.append(*case.args, new, new, ints([[position]]), None, bounds)
        ops.select_tokens(
            query, case.k_pages, *case.args[2:5], ints([position]), None, None, bounds, *(state[n] for n in STATE),
            sinks, k, local, 0.9, 1.0, True, shortlist,
        )  # fmt: skip
        n = int(state["index_counts"][0, 0])
        return state["index"][0, 0, :n].tolist(), state["events"].tolist()

    chosen, events = step(q)
    assert events == [1, 0]
    assert len(chosen) == sinks + k + local
    assert chosen[:sinks] == list(range(sinks))
    assert chosen[-local:] == list(range(201 - local, 201))
    grown, events = step(q * 2)
    assert grown == [*chosen, 201]
    assert events == [1, 1]
    other, events = step(-q)
    assert events == [2, 1]
    assert len(other) == sinks + k + local
    assert torch.equal(state["query"], -q)
    if shortlist:
        return
    for i in range(1, 10):
        assert step(-q)[1] == [2, 1 + i]
    assert len(state["index"][0, 0, : int(state["index_counts"][0, 0])].unique()) == sinks + k + local + 9


def test_a_list_of_a_row_that_holds_little_is_all_of_it(backend):
    case, g = filled(20)
    q = torch.randn(1, 4, 64, generator=g).bfloat16()
    state = empty_state(q, 60)
    ops.select_tokens(
        q, case.k_pages, *case.args[2:5], ints([19]), None, None, None, *(state[n] for n in STATE), 4, 10, 6, 0.9
    )
    assert state["index"][0, 0, :20].tolist() == list(range(20))
    assert state["index_counts"].tolist() == [[20]]
    assert state["at"].tolist() == [0]
    assert state["events"].tolist() == [0, 0]


def test_a_step_done_again_is_not_counted_twice(backend):
    """An undone step leaves its list behind: the next one finds the same slot at its end."""
    case, g = filled(80)
    q = torch.randn(1, 4, 64, generator=g).bfloat16()
    state = empty_state(q, 60)

    def step():
        ops.select_tokens(
            q, case.k_pages, *case.args[2:5], ints([79]), None, None, None, *(state[n] for n in STATE), 4, 10, 6, 0.9
        )
        return state["index"].clone(), state["index_counts"].clone()

    once = step()
    for a, b in zip(once, step()):
        assert torch.equal(a, b)
    case.counts.fill_(79)  # the token that was undone never came back
    ops.select_tokens(
        q, case.k_pages, *case.args[2:5], ints([-1]), None, None, None, *(state[n] for n in STATE), 4, 10, 6, 0.9
    )
    assert state["index_counts"].tolist() == [[int(once[1]) - 1]]
    assert int(state["until"]) == 79


@pytest.mark.parametrize("shortlist", [0, 300])
def test_one_row_of_many_chooses(fast_backend, shortlist):
    """Long rows, of which one needs a list: the others' lists stay as they were, bit for bit."""
    sinks, k, local, rows = 8, 500, 100, 3
    case, g = filled(20_000, rows=rows)
    q = torch.randn(rows, 4, 64, generator=g).bfloat16()
    state = empty_state(q, sinks + k + 2 * local)
    bounds = bounds_of(case) if shortlist else None
    position = torch.full((rows,), 19_999, dtype=torch.int32)

    def step(query):
        want, _ = wanted(query, case, position, None, bounds, state, sinks, k, local, 0.9, 1.0, True, max(shortlist, 1))
        ops.select_tokens(
            query, case.k_pages, *case.args[2:5], position, None, None, bounds, *(state[n] for n in STATE), sinks, k,
            local, 0.9, 1.0, True, shortlist,
        )  # fmt: skip
        for name in STATE:
            assert torch.equal(state[name], want[name]), name

    step(q)
    assert state["events"].tolist() == [3, 0]
    lists = state["index"].clone()
    step(torch.stack([q[0], -q[1], q[2]]))
    assert state["events"].tolist() == [4, 2]
    assert [bool(torch.equal(a, b)) for a, b in zip(lists, state["index"])] == [True, False, True]
