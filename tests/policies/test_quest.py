"""Quest: bounds of pages, what a step reads by them, and that it evicts nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import engine, step, unit
from support.models import build, prompt
from support.runs import run

import kvcache
from kvcache import Quest, ops


def keys_of(*rows):
    """Keys [1, 1, T, D] by hand."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def bounds_of(e, q):
    """Bounds [H, pages] of the pages of the only layer for the queries ``q`` [Hq, D], summed over a kv head's."""
    store = e.layers[0].store
    nothing = torch.zeros(1, dtype=torch.int32)
    return ops.page_scores(
        q[None], store.storage.bounds, store.table, store.counts, store.positions, nothing, nothing + 1000, 1.0,
        soft=False, per_head=True,
    )[0]  # fmt: skip


def test_the_bound_of_the_example(backend):
    """papers.md, section 9: q = [1, -2] over (1, 3), (2, -1), (0, 0): min (0, -1), max (2, 3), bound 2 + 2 = 4."""
    keys = keys_of((1, 3), (2, -1), (0, 0))
    e = engine(Quest(4, 0))
    step(e, torch.zeros(1, 1, 3, 2), keys, keys)
    q = torch.tensor([[1.0, -2.0]])
    assert bounds_of(e, q)[0, 0] == 4.0 == (keys[0, 0] @ q[0]).max()


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_no_key_has_a_larger_product_than_its_page_says(tokens, group, page_size, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, tokens, 8, generator=generator)
    e = engine(Quest(1, 0), page_size=page_size)
    first = tokens // 2 + 1
    step(e, torch.zeros(1, 2 * group, first, 8), keys[:, :, :first], keys[:, :, :first])
    for t in range(first, tokens):  # pages that are filled one token at a time
        step(e, torch.zeros(1, 2 * group, 1, 8), keys[:, :, t : t + 1], keys[:, :, t : t + 1])
    q = torch.randn(2 * group, 8, generator=generator)
    found = bounds_of(e, q)
    for h in range(2):
        products = (keys[0, h] @ q[h * group : (h + 1) * group].T).sum(1)
        for page, some in enumerate(products.split(page_size)):
            assert found[h, page] >= some.max() - 1e-4


def reads(policy, q, keys, page_size):
    """Positions that each query head reads in a step behind a prompt of ``keys`` [1, H, n, 8] for ``q`` [Hq, 8]."""
    heads, n = keys.shape[1], keys.shape[2]
    values = torch.eye(16)[None, None, :n].expand(1, heads, n, 16)
    e = engine(policy, page_size=page_size)
    step(e, torch.zeros(1, len(q), n, 8), keys, values)
    out = step(e, q[None, :, None], torch.zeros(1, heads, 1, 8), torch.eye(16)[n].expand(1, heads, 1, 16), scale=1e-3)
    store = e.layers[0].store
    assert store.counts.tolist() == [[n + 1] * heads]  # nothing left
    return [row.nonzero()[:, 0].tolist() for row in out[0, 0] > 1e-6]


def test_every_kv_head_reads_its_own_pages_and_the_newest(backend):
    keys = torch.zeros(1, 2, 6, 8)
    keys[0, 0, 1, 0] = keys[0, 1, 4, 0] = 1.0
    q = unit(0)[0, 0].expand(2, 8)
    assert reads(Quest(4, 0), q, keys, 2) == [[0, 1, 6], [4, 5, 6]]
    assert reads(Quest(2, 0), q, keys, 2) == [[6], [6]]
    assert reads(Quest(1, 0), q, keys, 4) == [[4, 5, 6], [4, 5, 6]]  # a page is the least
    assert reads(Quest(4, 1), q, keys, 2) == [list(range(7))] * 2  # a dense layer
    assert reads(Quest(8, 0), q, keys, 2) == [list(range(7))] * 2  # all four pages


def test_a_page_may_promise_what_no_key_of_it_holds(backend):
    """Two keys that are large in different channels bound a page by both together: 2 > 1.5."""
    keys = torch.zeros(1, 1, 4, 8)
    keys[0, 0, 0, 0] = keys[0, 0, 1, 1] = 1.0
    keys[0, 0, 2, :2] = 0.75
    q = (unit(0) + unit(1))[0, 0]
    assert reads(Quest(4, 0), q, keys, 2) == [[0, 1, 4]]
    assert reads(Quest(2, 0), q, keys, 1) == [[2, 4]]


def test_query_heads_of_a_group_choose_together_by_the_mean(backend):
    keys = torch.zeros(1, 1, 3, 8)
    for token, channel, size in ((0, 0, 3.0), (1, 1, 2.0), (2, 0, 2.0), (2, 1, 1.5)):
        keys[0, 0, token, channel] = size
    q = torch.cat([unit(0), unit(1)], 2)[0, 0]  # alone they would read tokens 0 and 1; together 3, 2 and 3.5
    assert reads(Quest(2, 0), q, keys, 1) == [[2, 3]] * 2


def test_drafts_read_what_they_would_read_alone(backend):
    """Five tokens at once, of which each chooses for itself, over a border of pages, against one by one."""
    ids = prompt(53, seed=4)
    model = kvcache.wrap(build(), Quest(32, 1))
    alone = run(model, ids, 46).logits
    cache = kvcache.KVCache(model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :46], past_key_values=cache)
        cache.crop(0)
        found = model(ids[:, 46:51], past_key_values=cache).logits
        kvcache.wrap(model, "full")
        dense = model(ids).logits
    assert (found - alone[:, 46:51]).abs().max() < 5e-5
    assert (found - dense[:, 46:51]).abs().max() > 0.1


def test_a_turn_of_several_tokens_is_a_prompt_and_reads_everything(backend):
    ids = prompt(60, seed=4)
    model = kvcache.wrap(build(), Quest(16, 0))
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, :50], ids[:, 50:])]
        kvcache.wrap(model, "full")
        assert (torch.cat(parts, 1) - model(ids).logits).abs().max() < 5e-5


def test_layers_with_a_window_read_it_and_latent_attention_is_refused():
    model = kvcache.wrap(build("gemma3"), Quest(16, 0))
    result = run(model, prompt(60, seed=4), 50)
    assert {tuple(result.cache.kept(i)[0].tolist()) for i in range(4)} == {(15, 15), (60, 60)}
    with pytest.raises(ValueError, match="selection needs the keys as cached"):
        kvcache.wrap(build("deepseek-v3"), Quest())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quest(k=0)", "k must be at least 1, got 0"),
        ("quest(dense_layers=-1)", "dense_layers must be at least 0, got -1"),
        ("h2o | quest", "cannot combine h2o.*Quest reads from everything that was seen, but H2O evicts"),
    ],
)
def test_bad_arguments_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        kvcache.parse_policy(text)
    with pytest.raises(TypeError, match="k must be an int, got 0.5"):
        kvcache.parse_policy("quest(k=0.5)")


def test_compact_positions_need_one_list_for_all_heads():
    """A policy of one's own may list pages; by place in the list keys are rotated only where all heads share it."""

    class _Pages(kvcache.Policy):
        positions, page_bounds = "compact", True
        lists = 1

        def select(self, layer, queries, positions):
            at = positions.amax(1).clamp(min=0)
            chosen = layer.choose_pages(queries[:, :, -1], 2, at)
            return kvcache.Selection(chosen.index[:, : self.lists], chosen.counts[:, : self.lists], pages=True)

        def __str__(self):
            return "pages"

    ids = prompt(40, seed=4)
    model = kvcache.wrap(build(), _Pages())
    with torch.no_grad():
        run(model, ids, 30)
        kvcache.wrap(model, type("_Two", (_Pages,), {"lists": 2})())
        with pytest.raises(ValueError, match="pages: positions='compact' needs one list for all kv heads"):
            run(model, ids, 30)
