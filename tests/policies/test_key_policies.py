"""Policies that score keys and values: what every head keeps is what the rule, written anew over dense tensors, gives.

Own code on purpose: one dense forward of the unwrapped model (support/dense.py), in which each head's rule decides step
by step what the next query sees.
"""

import pytest
import torch
from support.dense import Oracle, dense_logits
from support.engines import engine, held, step
from support.models import build, padded
from support.runs import run

import kvcache

PROMPT, TOTAL, LAYERS = 44, 70, 3


def tokens(seed=6):
    return (torch.randperm(94, generator=torch.Generator().manual_seed(seed))[:TOTAL] + 3)[None]


class Rules(Oracle):
    """What is kept by ``rule(layer, head, kept, k, v, n, ends) -> kept``: positions after ``n`` tokens, of which k and
    v [T, D] belong to one head; ``ends``: the last of them ended the prompt. ``kept[n][layer][head]``."""

    def __init__(self, rule, prompt):
        self.rule, self.prompt, self.kept = rule, prompt, {}

    def attend(self, layer, q, k, v, causal, logits):
        self.values = v
        return super().attend(layer, q, k, v, causal, logits)

    def visible(self, layer, q, k, probabilities):
        seen = super().visible(layer, q, k, probabilities)
        for h in range(k.shape[0]):
            kept = list(range(self.prompt - 1))
            for t in range(self.prompt - 1, q.shape[1]):
                if t >= self.prompt:
                    seen[h, t] = False
                    seen[h, t, [*kept, t]] = True
                kept = sorted(self.rule(layer, h, [*kept, t], k[h], self.values[h], t + 1, t + 1 == self.prompt))
                self.kept.setdefault(t + 1, {}).setdefault(layer, []).append(kept)
        return seen


def best(kept, budget, worth, first, end):
    """``budget`` of ``kept``: all before ``first`` and from ``end`` on, then those worth most."""
    protected = [p for p in kept if p < first or p >= end]
    rest = sorted((p for p in kept if first <= p < end), key=lambda p: (-float(worth[p]), p))
    return protected + rest[: max(budget - len(protected), 0)]


def knorm(policy):
    def rule(layer, head, kept, k, v, n, ends):
        if len(kept) <= policy.keep:
            return kept
        return best(kept, policy.keep, [-float(x) for x in (k * k).sum(1).sqrt()], policy.sinks, n - policy.recent)

    return rule


def keydiff(policy):
    def rule(layer, head, kept, k, v, n, ends):
        if len(kept) <= policy.keep + (0 if ends else policy.slack):
            return kept
        mean = sum(k[p] / k[p].norm() for p in kept) / len(kept)
        worth = {p: -float(k[p] @ mean / (k[p].norm() * mean.norm())) for p in kept}
        return best(kept, policy.keep, worth, policy.sinks, n - policy.recent)

    return rule


def lagkv(policy):
    places = {}

    def weight(x, members, reference):
        low, high = x[reference].min(0).values, x[reference].max(0).values
        return torch.stack([((x[m] - low) / (high - low)).std() for m in members]).softmax(0)

    def rule(layer, head, kept, k, v, n, ends):
        if len(kept) <= policy.keep + (0 if ends else policy.lag - 1):
            return kept
        place = places.setdefault((layer, head), {})
        for start in range(policy.sinks, n - 2 * policy.lag + 1, policy.lag):
            members = list(range(start, start + policy.lag))
            if start not in place:
                reference = [m + policy.lag for m in members]
                assert set(reference) <= set(kept)
                score = (weight(k, members, reference) + weight(v, members, reference)) / 2
                order = sorted(members, key=lambda m: (-float(score[m - start]), m))
                place.update({m: i for i, m in enumerate(order)})
        worth = {p: -place.get(p, -1) for p in kept}
        return best(kept, policy.keep, worth, policy.sinks, n)

    return rule


CASES = {
    "knorm": (kvcache.KNorm(10, sinks=2, recent=3), knorm),
    "knorm-bare": (kvcache.KNorm(9), knorm),
    "keydiff": (kvcache.KeyDiff(10, sinks=2, recent=3), keydiff),
    "keydiff-bare": (kvcache.KeyDiff(9), keydiff),
    "keydiff-slack": (kvcache.KeyDiff(10, sinks=1, recent=2, slack=6), keydiff),
    "lagkv": (kvcache.LagKV(14, sinks=2, lag=4), lagkv),
    "lagkv-least": (kvcache.LagKV(13, sinks=0, lag=7), lagkv),
    "lagkv-long": (kvcache.LagKV(30, sinks=3, lag=3), lagkv),
}


def predicted(model, policy, make, ids, prompt):
    oracle = Rules(make(policy), prompt)
    return dense_logits(model, ids, oracle), oracle.kept


def same_sets(log, expected, start, total, shift=0, row=0):
    for n in range(start, total + 1):
        for layer in range(LAYERS):
            assert log[n + shift][row][layer] == expected[n][layer], (n, layer)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_every_head_keeps_what_the_rule_says(case, name, backend):
    policy, make = CASES[case]
    if case.startswith("knorm") and name == "qwen3":
        name = "qwen2"  # qwen3 normalises its keys: here, with weights of 1, all have the same norm
    model = kvcache.wrap(build(name), policy, page_size=4)
    result = run(model, tokens(), PROMPT)
    kvcache.unwrap(model)
    logits, expected = predicted(model, policy, make, tokens(), PROMPT)
    same_sets(result.log, expected, PROMPT, TOTAL)
    assert (result.logits[0] - logits).abs().max() < 5e-5
    chosen = {tuple(head) for layer in result.log[TOTAL][0] for head in layer}
    assert len(chosen) > 1, "all heads keep the same: the test says nothing"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_padded_batch(case, side, backend):
    policy, make = CASES[case]
    lengths, new = (PROMPT, 29, 12), 20
    rows = [tokens(seed=6 + i) for i in range(3)]
    ids, mask = padded([row[0, :n] for row, n in zip(rows, lengths)], side)
    later = torch.cat([row[:, n : n + new] for row, n in zip(rows, lengths)])
    real = torch.cat([mask, torch.ones_like(later)], 1)
    model = kvcache.wrap(build("llama-gqa"), policy, page_size=4)
    log = run(model, torch.cat([ids, later], 1), PROMPT, real).log
    kvcache.unwrap(model)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        _, expected = predicted(model, policy, make, row[:, : n + new], n)
        same_sets(log, expected, n, n + new, PROMPT - n, r)


def feed(e, keys, values=None):
    """Keys [T, D] of one head in one forward."""
    k = keys[None, None]
    step(e, torch.zeros_like(k), k, k if values is None else values[None, None])


def test_knorm_of_an_example(backend):
    """Norms 5, 1, 3, 2 and then 4, 0.5: two smallest stay, and the newest."""
    e = engine(kvcache.KNorm(3, recent=1))
    norms = torch.tensor([5.0, 1.0, 3.0, 2.0])
    feed(e, norms[:, None] * torch.eye(8)[:4])
    assert held(e) == [1, 2, 3]  # 3 is the newest and would stay anyway; of 5, 1, 3 the two smallest
    feed(e, 4.0 * torch.eye(8)[4:5])
    assert held(e) == [1, 3, 4]
    feed(e, 0.5 * torch.eye(8)[5:6])
    assert held(e) == [1, 3, 5]


def test_keydiff_of_an_example(backend):
    """Three keys of one direction, whatever their length, and two that differ: two of the alike leave, newest first."""
    e = engine(kvcache.KeyDiff(3))
    x, y = torch.eye(8)[0], torch.eye(8)[1]
    feed(e, torch.stack([x, 2 * x, y, 7 * x, -x]))
    # The mean points along x and a little along y: cosines .89, .89, .45, .89, -.89.
    assert held(e) == [0, 2, 4]


def test_lagkv_of_an_example(backend):
    """Partitions of 2 behind 1 sink. Against a reference of [0, 1] in each channel a token's score is the spread of its
    own values: of (.5, .5) and (0, 1) the second stays."""
    even, uneven = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    zero, one = torch.zeros(2), torch.ones(2)
    e = engine(kvcache.LagKV(4, sinks=1, lag=2))
    feed(e, torch.stack([even, even, uneven, zero, one]))
    assert held(e) == [0, 2, 3, 4]  # the second partition has no reference: it stays
    feed(e, even[None])
    assert held(e) == [0, 2, 3, 4, 5]  # slack of lag - 1
    # Now [3, 4] has [5, 6] as its reference, which does not vary: both count 0, and 3 is before 4. Room is for one of
    # the first ones, 2 and 3.
    feed(e, even[None])
    assert held(e) == [0, 2, 5, 6]


def test_lagkv_takes_as_many_from_every_partition(backend):
    policy = kvcache.LagKV(3 + 7 + 4 * 3, sinks=3, lag=4)
    e = engine(policy)
    feed(e, torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    # 27 tokens behind the sinks: 6 partitions and 3 tokens; the last partition and those 3 are the tail.
    kept = held(e)
    assert kept[:3] == [0, 1, 2]
    assert kept[-7:] == list(range(23, 30))
    shares = [sum(3 + 4 * p <= x < 7 + 4 * p for x in kept) for p in range(5)]
    assert sum(shares) == 12
    assert max(shares) - min(shares) <= 1


# -- slack ----------------------------------------------------------------------------------------------------------


def counts_over_time(policy, steps=30, prompt=20):
    e = engine(policy)
    generator = torch.Generator().manual_seed(0)
    feed(e, torch.randn(prompt, 8, generator=generator))
    found = [len(held(e))]
    for _ in range(steps):
        feed(e, torch.randn(1, 8, generator=generator))
        found.append(len(held(e)))
    return found, e


def test_a_head_grows_by_its_slack_and_falls_back(backend):
    found, e = counts_over_time(kvcache.KeyDiff(8, slack=4))
    assert found == [8, *([9, 10, 11, 12, 8] * 6)]
    assert counts_over_time(kvcache.KeyDiff(8))[0] == [8] * 31
    assert e.layers[0].counters["evictions"] == 12 + 30


def test_the_score_is_asked_once_in_slack_and_one_tokens(monkeypatch, backend):
    asked = []
    score = kvcache.KeyDiff.score
    monkeypatch.setattr(kvcache.KeyDiff, "score", lambda self, layer: asked.append(1) or score(self, layer))
    counts_over_time(kvcache.KeyDiff(8, slack=4))
    assert len(asked) == 1 + 6
    asked.clear()
    counts_over_time(kvcache.KeyDiff(8))
    assert len(asked) == 1 + 30


def test_slack_makes_room_once(backend):
    """Neither pages nor tables move from one eviction to the next: a captured step stays right."""
    policy = kvcache.KeyDiff(8, slack=40)
    e = engine(policy)
    generator = torch.Generator().manual_seed(0)
    feed(e, torch.randn(300, 8, generator=generator))
    addresses = None
    for t in range(130):
        feed(e, torch.randn(1, 8, generator=generator))
        (storage,) = e.storages.values()
        store = e.layers[0].store
        now = [x.data_ptr() for x in (storage.k_pages, store.table, store.positions, store.columns)]
        if t >= 40:  # once they have grown
            assert addresses in (None, now)
            addresses = now


def test_pages_of_a_row_are_bounded_with_its_slack(backend):
    for slack in (0, 5, 9):
        e = engine(kvcache.KeyDiff(8, slack=slack))
        generator = torch.Generator().manual_seed(0)
        feed(e, torch.randn(20, 8, generator=generator))
        ((storage, bound),) = e.pages_bound([60]).items()
        most = 0
        for _ in range(40):
            k = torch.randn(1, 8, generator=generator)[None, None]
            e.begin(1, 1, None)
            e.append(e.layers[0], k, k, e.step)
            most = max(most, storage.pool.used)
            e.layers[0].new = None
            e.finish()
        assert most == bound[0] == -(-(8 + slack + 1) // 4)


def test_slack_is_foreseen_for_a_captured_step(backend):
    """A step may be captured if it evicts nothing, and only then."""
    e = engine(kvcache.KeyDiff(8, slack=4))
    generator = torch.Generator().manual_seed(0)
    feed(e, torch.randn(20, 8, generator=generator))
    foreseen = []
    for _ in range(10):
        k = torch.randn(1, 8, generator=generator)[None, None]
        e.begin(1, 1, None)
        foreseen.append(e.evictable_in_advance(e.step))
        e.append(e.layers[0], k, k, e.step)
        e.finish()
    assert foreseen == [True, True, True, True, False] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knorm(keep=0)", "keep"),
        ("knorm(sinks=-1)", "sinks"),
        ("knorm(recent=1.5)", "recent"),
        ("keydiff(keep=2.0)", "keep"),
        ("keydiff(slack=-1)", "slack"),
        ("keydiff(slack=0.5)", "slack"),
        ("keydif()", "keydiff"),
        ("lagkv(keep=100)", "at least sinks . 2 . lag - 1 = 259"),
        ("lagkv(lag=1)", "lag"),
        ("lagkv(sinks=-1)", "sinks"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kvcache.parse_policy(text)


def test_a_composition_has_the_slack_of_its_part():
    assert (kvcache.KeyDiff(8, slack=4) | kvcache.SkipDecode()).slack == 4
