"""What leaves goes into what stays: EMASink, CaM, D2O and KVMerger against their rules in plain torch."""

import math

import pytest
import torch
from support.dense import Replay, dense_logits
from support.engines import engine, held, step
from support.entries import EntryOracle
from support.models import build, greedy, padded, prompt
from support.runs import kept, own_log, run
from transformers import AutoModelForCausalLM, BloomConfig

import kvcache
from kvcache import D2O, H2O, CaM, EMASink, KVMerger, StreamingLLM
from kvcache.policies import merging

PROMPT, TOTAL = 30, 38
POLICIES = {
    "emasink": EMASink(sinks=4, window=7, alpha=0.6, pinned=1),
    "emasink-counted": EMASink(sinks=2, window=9, counted=True),
    "cam": CaM(6, 5, 4),
    "d2o": D2O(6, 5),
    "kvmerger": KVMerger(6, 5, bandwidth=0.9),
}
PLAIN = {"emasink": StreamingLLM(4, 7), "emasink-counted": StreamingLLM(2, 9)}


def wrapped(policy, kind="llama-gqa", **options):
    return kvcache.wrap(build(kind), policy, page_size=4, **options)


class Unturned:
    """The rotation of a model that has none, for keys made by hand."""

    @staticmethod
    def rotate(x, positions):
        return x

    unrotate = rotate


def by_hand(policy, **options):
    return engine(policy, rotation=Unturned(), **options)


def feed(e, keys, values=None, queries=None):
    """Keys, values and queries [T, D] of one head in one forward; queries of 0 attend evenly."""
    k = torch.as_tensor(keys, dtype=torch.float32)[None, None]
    v = k if values is None else torch.as_tensor(values, dtype=torch.float32)[None, None]
    q = torch.zeros_like(k) if queries is None else torch.as_tensor(queries, dtype=torch.float32)[None, None]
    step(e, q, k, v)


def entry(e, position):
    """(key, value) of what the first head holds at a position."""
    store = e.layers[0].store
    (slot,) = (store.positions[0, 0, : int(store.counts[0, 0])] == position).nonzero()[0].tolist()
    return tuple(store.gather(what)[0, 0, slot].tolist() for what in ("keys", "values"))


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mqa"])
@pytest.mark.parametrize("name", POLICIES)
def test_heads_merge_as_the_rule_says(name, kind, backend):
    model = wrapped(POLICIES[name], kind)
    result = run(model, prompt(TOTAL, seed=3), PROMPT)
    kvcache.unwrap(model)
    frequencies = model.model.rotary_emb.inv_freq
    oracle = EntryOracle(own_log(result), PROMPT, POLICIES[name], frequencies)
    assert (result.logits[0] - dense_logits(model, prompt(TOTAL, seed=3), oracle)).abs().max() < 5e-5
    plain = dense_logits(model, prompt(TOTAL, seed=3), Replay(own_log(result)))
    assert (result.logits[0] - plain).abs().max() > 0.1  # without merging it is another answer


@pytest.mark.parametrize("name", POLICIES)
def test_merging_costs_no_byte(name, backend):
    found = [run(wrapped(p), prompt(TOTAL), PROMPT).cache for p in (POLICIES[name], PLAIN.get(name, H2O(6, 5)))]
    assert found[0].nbytes == found[1].nbytes
    assert all(torch.equal(found[0].kept(i), found[1].kept(i)) for i in range(3))


# -- worked examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "states"),
    [(0.99, [[0.99, 0.01], [1.0001, 0.0099]]), (0.0, [[0.0, 1.0], [2.0, 0.0]]), (1.0, [[1.0, 0.0], [1.0, 0.0]])],
)
def test_ema_sink_of_an_example(alpha, states, backend):
    """S = [1, 0]; [0, 1] leaves, then [2, 0]."""
    e = by_hand(EMASink(sinks=1, window=1, alpha=alpha))
    feed(e, [[1, 0]])
    feed(e, [[0, 1]])
    for coming, state in zip([[2, 0], [5, 5]], states):
        feed(e, [coming])
        for x in entry(e, 0):
            assert x == pytest.approx(state, abs=1e-6)
    assert held(e) == [0, 3]


def test_ema_sink_takes_turns_and_pins(backend):
    """Tokens 4, 5, 6, ... behind 3 sinks, the first pinned: into sinks 1 and 2, in turns; all at once as one by one."""
    keys = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
    policy = EMASink(sinks=3, window=4, alpha=0.8, pinned=1)
    whole, single = by_hand(policy), by_hand(policy)
    feed(whole, keys)
    feed(single, keys[:7])
    for key in keys[7:]:
        feed(single, key[None])
    sinks = keys[:3].clone()
    for i in range(7):
        sinks[1 + i % 2] = 0.8 * sinks[1 + i % 2] + 0.2 * keys[3 + i]
    for e in (whole, single):
        assert held(e) == [0, 1, 2, 10, 11, 12, 13]
        for i in range(3):
            assert entry(e, i)[0] == pytest.approx(sinks[i].tolist(), abs=1e-6)
    assert entry(single, 0)[0] == keys[0].tolist()


def test_ema_sink_counts(backend):
    keys = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    e = by_hand(EMASink(sinks=2, window=3, counted=True))
    feed(e, keys[:8])
    for key in keys[8:]:
        feed(e, key[None])
    for i in range(2):
        assert entry(e, i)[0] == pytest.approx(keys[i:9:2].mean(0).tolist(), abs=1e-6)


def test_ema_sink_with_alpha_1_is_streamingllm(backend):
    a, b = (run(wrapped(p), prompt(TOTAL), PROMPT) for p in (EMASink(4, 7, 1.0), StreamingLLM(4, 7)))
    assert torch.equal(a.logits, b.logits)
    assert a.log == b.log


def test_ema_sink_does_not_stall_in_half_precision(backend):
    """A thousandth of the way at each step is less than bfloat16 can tell: the average goes on in float32."""
    e = by_hand(EMASink(sinks=1, window=1, alpha=0.999), kv_dtype=torch.bfloat16)
    feed(e, [[1.0, 0.0]])
    for _ in range(101):
        feed(e, [[2.0, 1.0]])
    left = 0.999**100
    assert entry(e, 0)[0] == pytest.approx([2 - left, 1 - left], rel=2**-8)
    e.crop(102)  # a sink that is new again begins anew
    feed(e, [[4.0, 4.0]])
    feed(e, [[8.0, 8.0]])
    feed(e, [[8.0, 8.0]])
    assert entry(e, 0)[0] == pytest.approx([4.004, 4.004], rel=2**-8)


def rows(*probabilities):
    """Queries whose softmax over unit keys is the given probabilities."""
    q = torch.full((len(probabilities), 8), -1e4)
    for i, row in enumerate(probabilities):
        for position, p in enumerate(row):
            if p:
                q[i, position] = math.log(p)
    return q


def test_cam_of_an_example(backend):
    """Sums of attention 2.2, .3, .9, .6: 1 leaves, and merges with probability .3 / .75, half for 2 and half for 3."""
    attention = rows([1.0], [0.8, 0.2], [0.3, 0.1, 0.6], [0.1, 0.0, 0.3, 0.6])
    values = torch.tensor([[1.0, 0], [0, 8], [3, 1], [5, 0]])
    merged = 0
    for seed in range(40):
        e = by_hand(CaM(heavy=1, recent=2, spread=2, seed=seed))
        feed(e, torch.eye(8)[:4], torch.nn.functional.pad(values, (0, 6)), attention)
        assert held(e) == [0, 2, 3]
        found = [entry(e, p)[1][:2] for p in (0, 2, 3)]
        assert found in ([[1, 0], [3, 1], [5, 0]], [[1, 0], [3, 5], [5, 4]])
        merged += found[1] == [3, 5]
    assert 8 <= merged <= 24  # 16 of 40 expected


def test_cam_always_merges_what_is_attended_most_and_never_what_is_not(backend):
    for seed in range(5):
        e = by_hand(CaM(heavy=0, recent=2, spread=4, seed=seed))
        feed(e, torch.eye(8)[:3], 8 * torch.eye(8)[:3], rows([1.0], [0.9, 0.1], [0.8, 0.1, 0.1]))
        assert held(e) == [1, 2]
        # A quarter of the value for each of those behind, of which there are only two.
        assert [entry(e, p)[1][:3] for p in (1, 2)] == [[2, 8, 0], [2, 0, 8]]
        e = by_hand(CaM(heavy=1, recent=1, spread=4, seed=seed))
        feed(e, torch.eye(8)[:3], 8 * torch.eye(8)[:3], rows([1.0], [1.0], [0.5, 0, 0.5]))
        assert held(e) == [0, 2]
        assert entry(e, 2)[1][:3] == [0, 0, 8]


def test_d2o_of_an_example(backend):
    """Two leave: one is like the kept [4, 0] and merges, the other is like nobody and is dropped."""
    e = by_hand(D2O(heavy=0, recent=2))
    feed(e, [[1.0, 0.1], [-1, 0.9], [4, 0], [0, -1]], [[10.0, 0], [70, 7], [1, 3], [5, 5]])
    assert held(e) == [2, 3]
    cosine = 1 / math.hypot(1, 0.1)
    w = math.exp(cosine) / (math.exp(cosine) + math.e)
    key, value = entry(e, 2)
    assert key == pytest.approx([4 * (1 - w) + w, 0.1 * w])
    assert value == pytest.approx([1 - w + 10 * w, 3 * (1 - w)])
    assert entry(e, 3) == ([0, -1], [5, 5])
    cosines = [cosine, -0.9 / math.hypot(1, 0.9)]
    threshold = sum(cosines) / 2
    assert e.layers[0].state["threshold"].item() == pytest.approx(threshold)
    feed(e, [[0.5, 0.5]])  # [4, 0] leaves now, and goes into the newest
    cosine = (4 * (1 - w) + w + 0.1 * w) / math.sqrt(2) / math.hypot(*key)
    assert e.layers[0].state["threshold"].item() == pytest.approx((threshold + cosine) / 2)
    w = math.exp(cosine) / (math.exp(cosine) + math.e)
    assert entry(e, 4)[0] == pytest.approx([0.5 * (1 - w) + key[0] * w, 0.5 * (1 - w) + key[1] * w])


@pytest.mark.parametrize("policy", [D2O(4, 4), KVMerger(4, 4)])
def test_means_do_not_shrink(policy, backend):
    """Of equal values the mean is that value, however many merge."""
    e = by_hand(policy)
    keys = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    feed(e, keys, torch.full((60, 8), 3.0))
    for key in keys[:5]:
        feed(e, key[None], torch.full((1, 8), 3.0))
    assert e.layers[0].store.gather("values") == pytest.approx(torch.full((1, 1, 8, 8), 3.0))
    assert not torch.equal(e.layers[0].store.gather("keys")[0, 0], keys[[*range(52, 60)]])


def test_kvmerger_of_an_example(backend):
    """[1, 1] and [2, 0] go into [2, 0.5]: distances sqrt(1.25) and .5, width 1 of |p| = sqrt(4.25)."""
    e = by_hand(KVMerger(heavy=0, recent=2, bandwidth=1.0))
    feed(e, [[1.0, 1], [2, 0], [2, 0.5], [-1, -1]], [[4.0, 0], [0, 4], [1, 1], [9, 9]])
    a, b = math.exp(-1.25 / 8.5), math.exp(-0.25 / 8.5)
    key, value = entry(e, 2)
    total = 1 + a + b
    assert key == pytest.approx([(2 + a + 2 * b) / total, (0.5 + a) / total])
    assert value == pytest.approx([(1 + 4 * a) / total, (1 + 4 * b) / total])
    assert entry(e, 3) == ([-1, -1], [9, 9])


def test_the_size_of_blocks_does_not_matter(monkeypatch, backend):
    for name in ("cam", "d2o", "kvmerger"):
        a = run(wrapped(POLICIES[name]), prompt(PROMPT + 3), PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr(merging, "_PAIRS", 100)
            b = run(wrapped(POLICIES[name]), prompt(PROMPT + 3), PROMPT)
        assert a.log == b.log
        assert (a.logits - b.logits).abs().max() < 5e-5


# -- pages that others hold, forwards that fail, drafts -------------------------------------------------------------


def content(cache):
    """Keys, values and positions of all layers."""
    found = []
    for layer in cache.engine.layers:
        order = layer.store.positions[..., : layer.store.max_count].argsort(-1)
        for what in ("keys", "values"):
            x = layer.store.gather(what)
            found.append(x.gather(2, order[..., None].expand_as(x)))
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(content(a), content(b), strict=True))


@torch.no_grad()
def go_on(model, cache, ids):
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1)


@pytest.mark.parametrize("name", ["emasink", "cam", "d2o"])
def test_a_merge_writes_to_no_page_of_a_fork(name, backend):
    model = wrapped(POLICIES[name])
    cache, alone = (run(model, prompt(PROMPT), PROMPT).cache for _ in range(2))
    fork, before = cache.fork(), content(cache)
    found = go_on(model, fork, prompt(3, seed=4))
    assert all(torch.equal(x, y) for x, y in zip(before, content(cache), strict=True))
    assert torch.equal(found, go_on(model, alone, prompt(3, seed=4)))
    assert same(fork, alone)
    expected = run(model, torch.cat([prompt(PROMPT), prompt(3, seed=5)], 1), PROMPT).logits[:, PROMPT:]
    assert torch.equal(go_on(model, cache, prompt(3, seed=5)), expected)
    pools = {s.pool for s in cache.engine.storages.values()}
    del cache, fork, alone
    assert all(pool.used == 0 for pool in pools)


def test_forks_within_max_tokens(backend):
    """Copies that a merge takes are counted before the forward begins."""
    model = wrapped(D2O(6, 5), max_tokens=60)
    cache = run(model, prompt(PROMPT), PROMPT).cache
    forks = [cache.fork() for _ in range(4)]
    before, done = content(cache), 0
    for fork in forks:
        try:
            go_on(model, fork, prompt(3, seed=4))
            done += 1
        except kvcache.OutOfPages:
            assert (
                all(torch.equal(x, y) for x, y in zip(before, content(fork), strict=True)) or fork.seen_tokens > PROMPT
            )
    assert 0 < done < 4
    assert all(torch.equal(x, y) for x, y in zip(before, content(cache), strict=True))


@pytest.mark.parametrize("name", ["emasink", "d2o"])
def test_a_forward_that_fails_leaves_everything_as_it_was(name, monkeypatch, backend):
    model = wrapped(POLICIES[name])
    cache = run(model, prompt(PROMPT + 3), PROMPT).cache
    twin, states = cache.fork(), [dict(x.state) for x in cache.engine.layers]
    before = content(cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go_on(model, cache, prompt(1, seed=9))
    assert all(torch.equal(x, y) for x, y in zip(before, content(cache), strict=True))
    for layer, state in zip(cache.engine.layers, states, strict=True):
        assert layer.state.keys() == state.keys()
        assert all(torch.equal(layer.state[k], v) for k, v in state.items())
    assert torch.equal(go_on(model, cache, prompt(5, seed=9)), go_on(model, twin, prompt(5, seed=9)))


@pytest.mark.parametrize("name", ["emasink", "cam", "d2o"])
def test_drafts_that_are_rejected_merge_into_nothing(name, backend):
    model = wrapped(POLICIES[name])
    cache = run(model, prompt(PROMPT), PROMPT).cache
    twin = cache.fork()
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(4, seed=6), past_key_values=cache)
    cache.crop(-4)
    assert kept(cache) == kept(twin)
    assert same(cache, twin)
    with torch.no_grad():
        model(prompt(4, seed=6), past_key_values=cache)
    cache.crop(-2)  # two accepted: they evict two, at once
    cache.engine.recording = False
    assert all(layer.store.counts.max() == 11 for layer in cache.engine.layers)
    assert not same(cache, twin)


@pytest.mark.parametrize("name", ["emasink", "d2o"])
def test_beams_and_exports(name, backend):
    model = wrapped(POLICIES[name])
    ids, mask = padded([prompt(30, seed=1)[0], prompt(19, seed=2)[0]], "left")
    out = greedy(model, ids, mask, 5, num_beams=3)
    assert torch.equal(out.sequences, greedy(model, ids, mask, 5, num_beams=3).sequences)
    cache = run(model, prompt(PROMPT), PROMPT).cache
    again = kvcache.KVCache.import_state(model, cache.export_state())
    assert torch.equal(go_on(model, cache, prompt(6, seed=5)), go_on(model, again, prompt(6, seed=5)))


@pytest.mark.parametrize(("policy", "foreseen"), [(D2O(20, 12), False), (H2O(20, 12), True)])
def test_no_graph_may_foresee_a_merge(policy, foreseen):
    """Until the budget is reached a step of either can be captured; the one that is over it merges outside."""
    model = wrapped(policy)
    cache = run(model, prompt(31), 30).cache
    for expected in (True, foreseen, foreseen):  # 31, 32 and 32 of 32 before the step
        cache.begin(1, 1, None)
        assert cache.engine.evictable_in_advance(cache.engine.step) == expected
        cache.abort()
        go_on(model, cache, prompt(1))


# -- what cannot be -------------------------------------------------------------------------------------------------


def test_windows_of_the_model_merge_nothing(backend):
    """Mistral: every layer has one, and what leaves it leaves for good. Gemma 2: every other layer."""
    model = wrapped(CaM(6, 5, 4), "mistral")
    found = run(model, prompt(TOTAL), PROMPT).logits
    assert torch.equal(found, run(kvcache.wrap(model, H2O(6, 5)), prompt(TOTAL), PROMPT).logits)
    model = wrapped(D2O(6, 5), "gemma2")
    a, b = (run(kvcache.wrap(model, p), prompt(PROMPT), PROMPT).cache for p in (D2O(6, 5), H2O(6, 5)))
    merged, plain = content(a), content(b)
    for i, layer in enumerate(a.engine.layers):
        assert torch.equal(merged[2 * i], plain[2 * i]) == (layer.window is not None), i


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_values_merge_without_a_rotation_but_keys_do_not(name, backend):
    if name == "bloom":
        config = BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = build(name, n_layer=2)
    for policy in (D2O(6, 5), KVMerger(6, 5), EMASink(4, 7), D2O(6, 5) | kvcache.SkipDecode(1, 2)):
        with pytest.raises(ValueError, match=r"merging keys needs rotary embeddings.*For?CausalLM|LMHeadModel"):
            kvcache.wrap(model, policy)
    policy = CaM(6, 5, 4)
    result = run(kvcache.wrap(model, policy), prompt(TOTAL), PROMPT)
    if name == "bloom":  # its own attention is no function that the oracle could stand for
        assert (result.logits - run(kvcache.wrap(model, H2O(6, 5)), prompt(TOTAL), PROMPT).logits).abs().max() > 1e-4
        return
    kvcache.unwrap(model)
    expected = dense_logits(model, prompt(TOTAL), EntryOracle(own_log(result), PROMPT, policy))
    assert (result.logits[0] - expected).abs().max() < 5e-5


@pytest.mark.parametrize("policy", [CaM(6, 5), D2O(6, 5), KVMerger(6, 5), EMASink(4, 7)])
def test_latents_do_not_merge(policy):
    with pytest.raises(ValueError, match=r"merging needs the keys and values as cached.*DeepseekV3.*MLA"):
        kvcache.wrap(build("deepseek-v3"), policy)


def test_a_policy_that_merges_into_what_is_not_there_is_told(backend):
    class _Wrong(StreamingLLM):
        def merge(self, layer, evicted, kept):
            return kvcache.Merged(evicted.int().argmax(-1, keepdim=True), values=layer.values()[:, :, :1].float())

    with pytest.raises(ValueError, match="merge.. names slots that hold no entry that stays"):
        run(wrapped(_Wrong(2, 5)), prompt(20), 20)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EMASink(alpha=1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: EMASink(alpha=float("nan")), ValueError, "alpha.*nan"),
        (lambda: EMASink(alpha="0.9"), TypeError, "alpha must be a number, got '0.9'"),
        (lambda: EMASink(sinks=2, pinned=2), ValueError, "pinned must be less than sinks.*2 of 2"),
        (lambda: EMASink(sinks=0), ValueError, "pinned must be less than sinks.*0 of 0"),
        (lambda: EMASink(pinned=-1), ValueError, "pinned must be at least 0"),
        (lambda: EMASink(counted=1), TypeError, "counted must be True or False, got 1"),
        (lambda: EMASink(window=0), ValueError, "window must be at least 1"),
        (lambda: CaM(spread=0), ValueError, "spread must be at least 1"),
        (lambda: CaM(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: CaM(heavy=2.0), ValueError, "heavy"),
        (lambda: D2O(smoothing=0), ValueError, r"smoothing must be in \(0, 1\], got 0"),
        (lambda: D2O(smoothing=None), TypeError, "smoothing must be a number"),
        (lambda: D2O(group="median"), ValueError, "group"),
        (lambda: KVMerger(bandwidth=0.0), ValueError, "bandwidth must be more than 0"),
        (lambda: KVMerger(bandwidth=float("inf")), ValueError, "bandwidth.*finite, got inf"),
        (lambda: KVMerger(bandwidth=True), TypeError, "bandwidth must be a number, got True"),
        (lambda: D2O() | H2O(), ValueError, "cannot combine.*retention"),
        (lambda: CaM() | kvcache.TokenSelect(), ValueError, "cannot combine.*CaM evicts"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
