"""Scores of rejected drafts never count; forks of one prompt share it."""

import pytest
import torch
from support.models import build, continued, prompt
from support.policies import POLICIES

import kvcache

NAMES = ["full", "streamingllm", "h2o", "random", "tokenselect", "skipdecode", "h2o|skipdecode"]
NAMES += ["keydiff-slack", "lagkv", "duoattention", "expectedattention", "tova", "snapkv", "adakv-evict"]
NAMES += ["promptdistill", "promptdistill-truncate", "gemfilter", "trimkv", "trimkv-global", "quest", "rkv"]


@pytest.mark.parametrize("seed", [0, 5])  # an assistant that is always right, and one that is mostly wrong
def test_scores_after_assisted_decoding_are_those_of_a_plain_run(seed):
    model = kvcache.wrap(build(), kvcache.H2O(100, 100))
    ids = prompt(30)
    cache = kvcache.KVCache(model)
    sequence = model.generate(
        ids, past_key_values=cache, assistant_model=build(seed=seed), do_sample=False, max_new_tokens=20
    )
    plain = kvcache.KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=plain)
        for token in sequence[:, 30 : cache.seen_tokens].split(1, 1):
            model(token, past_key_values=plain)
    assert cache.seen_tokens == plain.seen_tokens
    for a, b in zip(cache.engine.layers, plain.engine.layers):
        n = a.store.max_count
        assert n == b.store.max_count
        order, same = (x.store.positions[..., :n].argsort(-1) for x in (a, b))
        found, expected = a.store.columns[0].gather(-1, order), b.store.columns[0].gather(-1, same)
        assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_forks_of_a_prompt_share_it_and_go_on_alike(name):
    model = kvcache.wrap(build(num_hidden_layers=5), POLICIES[name], page_size=4)
    system = prompt(40)
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        model(system, past_key_values=cache)
    (storage,) = cache.engine.storages.values()
    before = storage.pool.used
    forks = [cache.fork() for _ in range(6)]
    assert storage.pool.used == before
    for i, fork in enumerate(forks):
        ids = torch.cat([system, prompt(5, seed=70 + i)], 1)
        fresh = kvcache.KVCache(model)
        with torch.no_grad():
            model(system, past_key_values=fresh)
        expected = continued(model, ids, new=6, past_key_values=fresh)
        assert torch.equal(continued(model, ids, new=6, past_key_values=fork), expected), i
    if name == "full":  # 40 entries fill 10 pages of 4; each fork adds the 10 that it has read since
        assert storage.pool.used == before + 6 * 3 * 5 * 2
    del forks, fork
    assert storage.pool.used == before
