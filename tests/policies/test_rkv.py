"""RKV: examples by hand, and which queries vote. The rule in whole models is in test_key_policies.py."""

import pytest
import torch
from support.engines import engine, held, step
from support.models import build, prompt
from support.runs import run

import kvcache
from kvcache import RKV
from kvcache.policies import rkv


def read(e, keys, attention=None):
    """Keys [T, 8] of one head in one forward; the last query gives ``attention`` to positions, nothing to others."""
    k = keys[None, None]
    q = torch.zeros_like(k)
    if attention is not None:
        q[0, 0, -1] = -1e4
        for position, p in attention.items():
            q[0, 0, -1, position] = torch.tensor(p).log()
    step(e, q, k, k)


def test_of_keys_that_are_alike_the_most_recent_stays(backend):
    """x, 2x, x, y, z: every x is like the other two; the last one is spared by both, the second by the last."""
    x, y, z = torch.eye(8)[:3]
    e = engine(RKV(3, window=1, lam=0.0, buffer=1))
    read(e, torch.stack([x, 2 * x, x, y, z]))
    assert held(e) == [2, 3, 4]
    # Sums of cosines with the others: 2, 1, 0 for the three, 0 for y, which is a tie with the third.
    assert scores_of(RKV(4, window=1, lam=0.0, buffer=1), [x, x, x, y, z]) == pytest.approx(
        (-torch.tensor([0.4, 0.2, 0.0, 0.0, 0.0]).softmax(0)).tolist()
    )


def scores_of(policy, keys):
    """Scores of ``keys`` in a layer with room for all of them."""
    e = engine(RKV(100, window=1, buffer=1))
    read(e, torch.stack(keys))
    return policy.score(e.layers[0].view())[0, 0, : len(keys)].tolist()


def test_below_the_threshold_nothing_is_spared(backend):
    a = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    b = torch.tensor([0.6, 0.8, 0, 0, 0, 0, 0, 0])  # cosine .6 with a
    for threshold, sums in ((0.5, [0.0, 0.0, 0.0]), (0.7, [0.6, 0.6, 0.0])):
        policy = RKV(4, window=1, lam=0.0, buffer=1, threshold=threshold)
        found = scores_of(policy, [a, b, torch.eye(8)[2]])
        assert found == pytest.approx((-(torch.tensor(sums) / 3).softmax(0)).tolist())


def test_the_newest_queries_vote_also_while_decoding(backend):
    """lam 1, unpooled: the last two queries; attention goes to entries before the window alone."""
    e = engine(RKV(4, window=2, lam=1.0, buffer=1, pool=1))
    keys = torch.eye(8)
    read(e, keys[:4])
    read(e, keys[4:5], {0: 0.1, 1: 0.6, 2: 0.3})  # with the query before, which gives a third to each
    assert held(e) == [1, 2, 3, 4]
    read(e, keys[5:6], {1: 0.1, 2: 0.2, 3: 0.7})
    assert held(e) == [1, 3, 4, 5]  # (.6 / .9 + .1, .3 / .9 + .2, .7 after one query), the half of each


def test_attention_is_pooled_over_neighbours(backend):
    e = engine(RKV(4, window=1, lam=1.0, buffer=1, pool=3))
    read(e, torch.eye(8)[:6], {0: 0.05, 1: 0.03, 2: 0.1, 3: 0.8, 4: 0.02})
    assert held(e) == [2, 3, 4, 5]


def test_heads_exceed_the_budget_by_less_than_the_buffer():
    model = kvcache.wrap(build(), RKV(10, window=3, buffer=4))
    log = run(model, prompt(40, seed=4), 30).log
    counts = [{len(h) for layer in log[t][0] for h in layer} for t in range(30, 41)]
    assert counts == [{10 + i % 4} for i in range(11)]


def newest(cache):
    return [(x.state["places"], x.state["queries"]) for x in cache.engine.layers]


def test_queries_of_rejected_drafts_do_not_vote():
    model = kvcache.wrap(build(), RKV(60, window=5))
    ids = prompt(26, seed=4)
    with torch.no_grad():
        drafted, plain = kvcache.KVCache(model), kvcache.KVCache(model)
        drafted.activate_past_recording()
        model(ids[:, :20], past_key_values=drafted)
        drafted.crop(0)
        model(torch.cat([ids[:, 20:22], prompt(2, seed=9)], 1), past_key_values=drafted)
        drafted.crop(-2)
        model(ids[:, 22:24], past_key_values=drafted)
        drafted.crop(0)
        model(ids[:, :20], past_key_values=plain)
        for t in range(20, 24):
            model(ids[:, t : t + 1], past_key_values=plain)
    for (places, queries), (expected, others) in zip(newest(drafted), newest(plain)):
        assert places.tolist() == expected.tolist() == [[24, 23, 22, 21, 20]]
        assert (queries - others).abs().max() < 1e-5


def test_queries_that_were_taken_back_make_room():
    model = kvcache.wrap(build(), RKV(60, window=4))
    ids = prompt(20, seed=4)
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.crop(-2)
        model(prompt(1, seed=5), past_key_values=cache)
    for places, _ in newest(cache):
        assert places.tolist() == [[19, 18, 17, 0]]  # tokens 18 and 19 are gone, a new token 18 came


def test_cosines_in_parts_are_cosines(monkeypatch):
    model = kvcache.wrap(build(), RKV(12, window=3, buffer=5, threshold=0.2))
    expected = run(model, prompt(50, seed=4), 40)
    monkeypatch.setattr(rkv, "AT_ONCE", 500)
    found = run(model, prompt(50, seed=4), 40)
    assert found.log == expected.log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rkv(keep=8)", "keep must be more than window, which stays in any case; got 8 <= 8"),
        ("rkv(window=0)", "window must be at least 1"),
        ("rkv(lam=1.5)", r"lam must be in \[0, 1\], got 1.5"),
        ("rkv(threshold=-2)", r"threshold must be in \[-1, 1\], got -2"),
        ("rkv(buffer=0)", "buffer must be at least 1, got 0"),
        ("rkv(pool=4)", "pool must be odd.*got 4"),
    ],
)
def test_bad_arguments_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        kvcache.parse_policy(text)
    with pytest.raises(ValueError, match="needs queries that are made for the cached keys"):
        kvcache.wrap(build("deepseek-v3"), "rkv")
