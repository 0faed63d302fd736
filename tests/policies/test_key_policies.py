"""Policies that score keys and values: what every head keeps is what the rule, written anew over dense tensors, gives.

Own code on purpose: one dense forward of the unwrapped model (support/dense.py), in which each head's rule decides step
by step what the next query sees.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.dense import Oracle, dense_logits
from support.engines import engine, held, step
from support.models import build, padded
from support.policies import filters_of
from support.runs import run
from transformers import BloomForCausalLM

import kvcache
from kvcache.evaluation.tiny_models import tiny_model
from kvcache.step import Attention

PROMPT, TOTAL, LAYERS = 44, 70, 3


def tokens(seed=6):
    return (torch.randperm(94, generator=torch.Generator().manual_seed(seed))[:TOTAL] + 3)[None]


class Rules(Oracle):
    """What is kept by ``rule(layer, head, kept, k, v, n, ends) -> kept``: positions after ``n`` tokens, of which k and
    v [T, D] belong to one head; ``ends``: the last of them ended the prompt. ``kept[n][layer][head]``. For the rule lie
    there: ``rule.queries`` [group, T, D] of the head, ``rule.prompt`` and ``rule.frequencies`` of the rotation."""

    def __init__(self, rule, prompt):
        self.rule, self.prompt, self.kept = rule, prompt, {}
        rule.prompt = prompt

    def attend(self, layer, q, k, v, causal, logits):
        self.values = v
        return super().attend(layer, q, k, v, causal, logits)

    def visible(self, layer, q, k, probabilities):
        seen = super().visible(layer, q, k, probabilities)
        for h in range(k.shape[0]):
            self.rule.queries = q.unflatten(0, (k.shape[0], -1))[h]
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


def duoattention(policy):
    def rule(layer, head, kept, k, v, n, ends):
        return kept if policy.heads[layer][head] else [p for p in kept if p < policy.sinks or p >= n - policy.recent]

    return rule


def qfilters(policy):
    def rule(layer, head, kept, k, v, n, ends):
        if len(kept) <= policy.keep:
            return kept
        worth = -k @ torch.tensor(policy.filters[layer][head], dtype=k.dtype)
        return best(kept, policy.keep, worth, policy.sinks, n - policy.recent)

    return rule


def rkv(policy):
    def rule(layer, head, kept, k, v, n, ends):
        if len(kept) <= policy.keep + (0 if ends else policy.buffer - 1):
            return kept
        old, given = [p for p in kept if p < n - policy.window], 0
        voters = range(max(n - policy.window, 0), n)
        for t in voters:
            given = given + (torch.stack([q[t] @ k[old].T for q in rule.queries]).amax(0) / 4).softmax(0)
        mean, half = [float(x) / len(voters) for x in given], policy.pool // 2
        attention = {p: max(mean[max(i - half, 0) : i + half + 1]) for i, p in enumerate(old)}
        unit = k[kept] / k[kept].norm(dim=1, keepdim=True)
        cosine = unit @ unit.T
        for i in range(len(kept)):
            cosine[i, i] = 0.0
            alike = [j for j in range(len(kept)) if j != i and cosine[i, j] > policy.threshold]
            if alike:
                cosine[i, alike[-1]] = 0.0
        redundancy = dict(zip(kept, cosine.mean(0).softmax(0).tolist()))
        worth = {p: policy.lam * attention[p] - (1 - policy.lam) * redundancy[p] for p in old}
        return best(kept, policy.keep, worth, 0, n - policy.window)

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


def expected_attention(policy):
    def rotation(p):
        angle = rule.frequencies.double() * p
        cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])

    statistics = {}

    def rule(layer, head, kept, k, v, n, ends):
        if (layer, head) not in statistics:
            prompt = range(policy.sinks, rule.prompt)
            plain = [torch.stack([rotation(p).T @ q[p] for p in prompt]) for q in rule.queries]
            statistics[layer, head] = [(x.mean(0), torch.cov(x.T, correction=0)) for x in plain]
        if len(kept) <= policy.keep + (0 if ends else policy.slack):
            return kept
        ahead = sum(rotation(n + i) for i in range(policy.horizon)) / policy.horizon
        free, total = [p for p in kept if p >= policy.sinks], 0
        for mean, covariance in statistics[layer, head]:
            m, c = ahead @ mean, ahead @ covariance @ ahead.T
            total = total + torch.stack([k[p] @ m / 4 + k[p] @ c @ k[p] / 32 for p in free]).softmax(0)
        worth = {p: float(x * v[p].norm()) for p, x in zip(free, total / len(rule.queries))}
        return best(kept, policy.keep, worth, policy.sinks, n - policy.recent)

    return rule


CLASSES = ((True, False, True, False), (False, True, False, False), (True, False, False, True))


def duo(name, **options):
    """Classes for a model with as many kv heads as ``name`` has."""
    heads = {"llama-mqa": 1, "llama-mha": 4}.get(name, 2)
    return kvcache.DuoAttention(tuple(layer[:heads] for layer in CLASSES), **options)


def filtered(name, **options):
    """Random filters for a model with as many kv heads as ``name`` has."""
    heads = {"llama-mqa": 1, "llama-mha": 4}.get(name, 2)
    return kvcache.QFilters(filters_of(LAYERS, heads), **options)


CASES = {
    "knorm": (kvcache.KNorm(10, sinks=2, recent=3), knorm),
    "knorm-bare": (kvcache.KNorm(9), knorm),
    "keydiff": (kvcache.KeyDiff(10, sinks=2, recent=3), keydiff),
    "keydiff-bare": (kvcache.KeyDiff(9), keydiff),
    "keydiff-slack": (kvcache.KeyDiff(10, sinks=1, recent=2, slack=6), keydiff),
    "lagkv": (kvcache.LagKV(14, sinks=2, lag=4), lagkv),
    "lagkv-least": (kvcache.LagKV(13, sinks=0, lag=7), lagkv),
    "lagkv-long": (kvcache.LagKV(30, sinks=3, lag=3), lagkv),
    "expectedattention": (kvcache.ExpectedAttention(11, horizon=20, sinks=2, recent=3), expected_attention),
    "expectedattention-slack": (kvcache.ExpectedAttention(9, horizon=5, sinks=0, slack=4), expected_attention),
    "duoattention": (duo("", sinks=2, recent=9), duoattention),
    "qfilters": (filtered("", keep=10, sinks=2, recent=3), qfilters),
    "rkv": (kvcache.RKV(13, window=4, lam=0.3, buffer=5, pool=3), rkv),
    "rkv-bare": (kvcache.RKV(9, window=1, buffer=1, pool=1, threshold=0.2), rkv),
    "rkv-redundancy": (kvcache.RKV(12, window=3, lam=0, buffer=3, threshold=0.1), rkv),
}


def predicted(model, policy, make, ids, prompt):
    oracle = Rules(make(policy), prompt)
    oracle.rule.frequencies = model.model.rotary_emb.inv_freq
    return dense_logits(model, ids, oracle), oracle.kept


def same_sets(log, expected, start, total, shift=0, row=0):
    for n in range(start, total + 1):
        for layer in range(LAYERS):
            assert log[n + shift][row][layer] == expected[n][layer], (n, layer)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_every_head_keeps_what_the_rule_says(case, name, backend):
    policy, make = CASES[case]
    if case == "duoattention":
        policy = duo(name, sinks=2, recent=9)
    if case == "qfilters":
        policy = filtered(name, keep=10, sinks=2, recent=3)
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


def test_duoattention_frees_the_bytes_of_streaming_heads(backend):
    classes = ((True, False), (False, False), (False, True))
    model = kvcache.wrap(build(), kvcache.DuoAttention(classes, sinks=4, recent=12), page_size=4)
    cache = run(model, tokens(), PROMPT).cache
    retrieval = sum(map(sum, classes))
    pages = retrieval * -(-TOTAL // 4) + (6 - retrieval) * -(-16 // 4)
    assert cache.nbytes == pages * 4 * 2 * 16 * 4
    (storage,) = cache.engine.storages.values()
    assert storage.pool.used == pages
    for layer, heads in enumerate(classes):
        assert cache.kept(layer)[0].tolist() == [TOTAL if x else 16 for x in heads]


@pytest.mark.parametrize(("share", "retrieval"), [(0.5, 3), (0.2, 1), (1.0, 6), (0.05, 0)])
def test_duoattention_draws_a_share_of_all_heads(share, retrieval):
    found = []
    for seed in (0, 0, 1):
        policy = kvcache.DuoAttention(share, sinks=1, recent=5, seed=seed)
        cache = run(kvcache.wrap(build(), policy), tokens(), PROMPT).cache
        found.append([cache.kept(layer)[0].tolist() for layer in range(LAYERS)])
        assert sum(n == TOTAL for layer in found[-1] for n in layer) == retrieval
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (share == 0.5)


def test_duoattention_reads_files(tmp_path):
    classes = [[True, False], [False, False], [False, True]]
    expected = kvcache.DuoAttention(classes)
    assert expected == kvcache.DuoAttention(torch.tensor(classes)) == kvcache.DuoAttention(heads=tuple(classes))
    assert hash(expected) == hash(kvcache.parse_policy(str(expected)))
    (tmp_path / "heads.json").write_text(json.dumps(classes))
    save_file({"retrieval": torch.tensor(classes)}, tmp_path / "heads.safetensors")
    counts = {}
    for name, policy in {
        "given": expected,
        "json": kvcache.DuoAttention(tmp_path / "heads.json"),
        "safetensors": kvcache.DuoAttention(str(tmp_path / "heads.safetensors")),
    }.items():
        assert kvcache.parse_policy(str(policy)) == policy
        small = kvcache.parse_policy(str(policy).replace("sinks=128, recent=256", "sinks=1, recent=8"))
        cache = run(kvcache.wrap(build(), small), tokens(), PROMPT).cache
        counts[name] = [cache.kept(layer)[0].tolist() for layer in range(LAYERS)]
    assert counts["json"] == counts["safetensors"] == counts["given"] == [[TOTAL, 9], [9, 9], [9, TOTAL]]


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (0.0, ValueError, r"\(0, 1\]"),
        (2, TypeError, "booleans"),
        ([], TypeError, "booleans"),
        ([[]], TypeError, "layer 0"),
        ([True, False], TypeError, "layer 0"),
        ([[True, 0.3]], ValueError, "layer 0"),
        (torch.tensor([[0.7, 0.1]]), ValueError, "layer 0"),
        ("nowhere.json", ValueError, "no file nowhere.json"),
        (__file__, ValueError, "json or a .safetensors"),
    ],
)
def test_heads_that_are_none(heads, error, message):
    with pytest.raises(error, match=message):
        kvcache.DuoAttention(heads)


def test_files_that_hold_no_heads(tmp_path):
    for name, content, message in (
        ("a.json", "[[", "no JSON"),
        ("b.json", "{}", "booleans"),
        ("c.safetensors", "junk", "no safetensors"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises((ValueError, TypeError), match=message):
            kvcache.DuoAttention(tmp_path / name)
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="one tensor"):
        kvcache.DuoAttention(tmp_path / "two.safetensors")


@pytest.mark.parametrize("heads", [((True, True),) * 4, ((True,),) * 3, ((True, True), (True, True), (True,))])
def test_heads_of_another_model_are_refused_at_wrap(heads):
    model = build()
    for policy in (kvcache.DuoAttention(heads), kvcache.DuoAttention(heads) | kvcache.SkipDecode(1, 3)):
        with pytest.raises(ValueError, match=r"heads.* has .*, (the|a layer of the) model"):
            kvcache.wrap(model, policy)
    kvcache.wrap(model, kvcache.DuoAttention(((True, True),) * 3))


def test_heads_that_no_configuration_tells_are_refused_when_the_prompt_ends():
    e = engine(kvcache.DuoAttention(((True, False),)))
    with pytest.raises(ValueError, match=r"heads\[0\] has 2 kv heads, layer 0 of the model 1"):
        feed(e, torch.randn(3, 8))


@pytest.mark.parametrize(
    ("queries", "keys", "norms", "kept"),
    [
        # All alike: exp(k.q) ||v|| is 7.4, 27, 1, 20.
        ([(1, 0)] * 4, [(2, 0), (1, 0), (0, 1), (3, 0)], [1, 10, 1, 1], [1, 3]),
        # Mean 0, variance 4 along the second channel: exp(4 k^2 / 2) is 7.4, 1, 1, 1.6.
        ([(0, 2), (0, -2)] * 2, [(0, 1), (0, 0), (9, 0), (0, -0.5)], [1, 1, 1, 1], [0, 3]),
    ],
)
def test_expected_attention_of_an_example(queries, keys, norms, kept, backend):
    """Without a rotation, the model's factor 1."""
    e = engine(kvcache.ExpectedAttention(2, sinks=0))
    q, k = (torch.tensor(x, dtype=torch.float32)[None, None] for x in (queries, keys))
    v = torch.tensor(norms, dtype=torch.float32)[:, None] * torch.tensor([0.6, -0.8])
    step(e, q, k, v[None, None])
    assert held(e) == kept


EXPECTED = kvcache.ExpectedAttention(20, horizon=20, sinks=3)


def statistics(cache):
    """Of every layer (queries that count [R], their mean and covariance)."""
    found = []
    for layer in cache.engine.layers:
        s = layer.state
        found.append((s["queries"], s["mean"], s["scatter"] / s["queries"].clamp(min=1)[:, None, None, None]))
    return found


def alike(a, b):
    for mine, theirs in zip(a, b, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_expected_attention_counts_the_prompt_and_nothing_else(backend):
    """In one piece or several, padded or not; neither sinks nor padding nor decoded tokens."""
    model = kvcache.wrap(build(), EXPECTED)
    whole = run(model, tokens()[:, :PROMPT], PROMPT).cache
    longer = run(model, tokens(), PROMPT).cache
    pieces = run(model, tokens(), PROMPT, chunks=[2, 11, 1, 30]).cache
    assert statistics(whole)[0][0].tolist() == [PROMPT - 3]
    alike(statistics(whole), statistics(longer))
    alike(statistics(whole), statistics(pieces))
    ids, mask = padded([tokens()[0, :PROMPT], tokens()[0, :17], tokens()[0, :2]], "left")
    batch = run(model, ids, PROMPT, mask).cache
    assert statistics(batch)[0][0].tolist() == [PROMPT - 3, 14, 0]
    short = run(model, tokens()[:, :17], 17).cache
    for part, row in ((whole, 0), (short, 1)):
        alike(statistics(part), [[x[row : row + 1] for x in layer] for layer in statistics(batch)])


def test_expected_attention_learns_from_every_prompt_and_forgets_none(backend):
    """A second turn adds to the first; forks, exports and taking tokens back keep what was learnt."""
    model = kvcache.wrap(build(), kvcache.ExpectedAttention(200, horizon=20, sinks=3))
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        for a, b in ((0, 20), (20, 21), (21, 40)):
            model(tokens()[:, a:b], past_key_values=cache)
    queries = statistics(cache)
    assert queries[0][0].tolist() == [20 - 3 + 19]
    alike(queries, statistics(cache.fork()))
    alike(queries, statistics(kvcache.KVCache.import_state(model, cache.export_state())))
    cache.crop(-10)
    alike(queries, statistics(cache))
    cache.batch_repeat_interleave(2)
    assert statistics(cache)[0][0].tolist() == [36, 36]


def test_a_forward_that_fails_teaches_nothing(backend):
    e = engine(kvcache.ExpectedAttention(50, sinks=0))
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 20, 8, generator=generator)
    step(e, k, k, k)
    before = {name: x.clone() for name, x in e.layers[0].state.items()}
    e.begin(1, 20, None)
    e.append(e.layers[0], -k, k, e.step)
    e.attend(e.layers[0], 3 * k, Attention(scale=1.0))
    assert e.layers[0].state["queries"].tolist() == [40]
    e.abort()
    assert all(torch.equal(x, before[name]) for name, x in e.layers[0].state.items())
    assert held(e) == list(range(20))


def test_drafts_that_are_refused_teach_nothing():
    """The first forward of assisted decoding brings the prompt and drafts, of which some are right."""
    model, ids = kvcache.wrap(build("llama-gqa"), EXPECTED), tokens()[:, :30]
    cache = kvcache.KVCache(model)
    model.generate(
        ids, past_key_values=cache, assistant_model=build("llama-gqa", seed=5), do_sample=False, max_new_tokens=12
    )
    found = statistics(cache)
    accepted = int(found[0][0]) - (30 - 3)
    assert 0 <= accepted < 3
    with torch.no_grad():
        sequence = model.generate(ids, do_sample=False, max_new_tokens=12)
    plain = run(model, sequence[:, : 30 + accepted], 30 + accepted).cache
    alike(found, statistics(plain))


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpt2", "rotary embeddings.*GPT2"), ("deepseek-v3", "cached keys.*MLA"), ("gemma3", "rotary embeddings.*Gemma3")],
)
def test_expected_attention_refuses_what_it_cannot_foresee(name, message):
    """No rotation, or several, or queries that are made for other keys than the cached ones."""
    model = build(name)
    for policy in (EXPECTED, EXPECTED | kvcache.SkipDecode(1, 2)):
        with pytest.raises(ValueError, match=message):
            kvcache.wrap(model, policy)


def test_expected_attention_refuses_models_that_show_no_queries():
    with pytest.raises(ValueError, match="computes attention itself"):
        kvcache.wrap(tiny_model(BloomForCausalLM, "bloom"), EXPECTED)


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
        ("duoattention(sinks=0.5)", "sinks"),
        ("expectedattention(horizon=0)", "horizon"),
        ("expectedattention(keep=0)", "keep"),
        ("expectedattention(slack=-1)", "slack"),
        ("duoattention(recent=0)", "recent"),
        ("duoattention(seed=-1)", "seed"),
        ("duoattention(heads=[[x]])", "heads"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kvcache.parse_policy(text)


def test_a_composition_has_the_slack_of_its_part():
    assert (kvcache.KeyDiff(8, slack=4) | kvcache.SkipDecode()).slack == 4
