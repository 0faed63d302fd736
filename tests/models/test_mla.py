"""Absorbed latent attention in models: which steps take it, and that nobody can tell from the tokens.

The oracles: the unwrapped model, and the same wrapped model made to expand all entries (which tests/oracles checks
against dense attention), whose scores and evictions must be the same.
"""

import copy
import sys

import pytest
import torch
import transformers
from support.models import build, continued, greedy, padded, prompt
from torch import nn

import kvcache
from kvcache import mla, ops
from kvcache.attention import CACHE
from kvcache.evaluation import compatibility
from kvcache.evaluation.tiny_models import tiny_model

#: Classes of transformers with latent attention whose layers call attention through the interface.
CLASSES = [
    "AXK1ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "LongcatFlashForCausalLM",
    "MiniCPM3ForCausalLM",
    "YoutuForCausalLM",
]
#: Those that also have layers of other kinds.
HYBRID = ["BailingHybridForCausalLM", pytest.param("KimiLinearForCausalLM", marks=pytest.mark.slow)]
POLICIES = {
    "full": "full",
    "wide": "h2o(heavy=300, recent=100)",
    "streamingllm": "streamingllm(sinks=2, window=10)",
    "h2o": "h2o(heavy=6, recent=6)",
    "h2o-max": kvcache.H2O(heavy=6, recent=6, group="max"),
    "skipdecode": "skipdecode(min_layers=1, max_layers=2, horizon=64)",
}


def make(name):
    types = compatibility.classes()
    if name not in types:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return tiny_model(getattr(transformers, name), types[name])


@pytest.fixture
def calls(monkeypatch):
    """Shapes [R, Hq, T] of the queries of all calls of the op."""
    seen, op = [], ops.latent_attention
    monkeypatch.setattr(ops, "latent_attention", lambda q, *args: seen.append(tuple(q.shape[:3])) or op(q, *args))
    return seen


def expanding(monkeypatch):
    """Make wrap() recognise nothing from now on."""
    monkeypatch.setattr(sys.modules["kvcache.wrap"], "with_absorbed", lambda model, plan: plan)


def batch():
    return padded([prompt(n, seed=n)[0] for n in (40, 25, 33)], "left")


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLASSES, *HYBRID])
def test_tokens_are_those_of_the_unwrapped_model(name, calls):
    model = make(name)
    one, (ids, mask) = prompt(40), batch()
    before = continued(model, one), continued(model, ids, mask)
    for policy in ("full", POLICIES["wide"]):
        kvcache.wrap(model, policy)
        plan = model._kvcache_state.plan
        assert plan.absorbed == plan.materialised != frozenset()
        calls.clear()
        assert torch.equal(continued(model, one), before[0])
        assert len(calls) == 23 * len(plan.absorbed)  # every step behind the prompt, every layer
        assert {shape[2] for shape in calls} == {1}
        assert torch.equal(continued(model, ids, mask), before[1])
    kvcache.unwrap(model)
    assert not any("expand_kv" in m.__dict__ for m in model.modules())
    calls.clear()
    assert torch.equal(continued(model, one), before[0])
    assert not calls


@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "deepseek-v3"])
def test_beams_samples_and_drafts(name):
    model = build(name) if name == "deepseek-v3" else make(name)
    ids = prompt(12).repeat(1, 3)

    def runs():
        torch.manual_seed(0)
        sampled = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=12)
        return [
            continued(model, ids, num_beams=3),
            continued(model, *batch(), num_beams=2),
            continued(model, ids, prompt_lookup_num_tokens=4),
            sampled,
        ]

    before = runs()
    kvcache.wrap(model, "full")
    for mine, theirs in zip(runs(), before):
        assert torch.equal(mine, theirs)


def test_drafts_are_checked_in_the_latent_space(calls):
    model = kvcache.wrap(build("deepseek-v3"), "full")
    continued(model, prompt(12).repeat(1, 3), prompt_lookup_num_tokens=4)
    assert max(shape[2] for shape in calls) > 1


@pytest.mark.parametrize("policy", ["wide", "h2o"])
def test_drafts_under_a_policy_that_scores(policy):
    """What was drafted is scored once it is accepted, by the queries that were expanded for it."""
    model = kvcache.wrap(build("deepseek-v3"), POLICIES[policy])
    ids = prompt(12).repeat(1, 3)
    plain = greedy(model, ids)
    drafted = greedy(model, ids, prompt_lookup_num_tokens=4)
    if policy == "wide":  # with evictions a draft's tokens see what they would not have seen one by one
        assert torch.equal(plain.sequences, drafted.sequences)
        a, b = plain[CACHE].engine.layers[1].store, drafted[CACHE].engine.layers[1].store
        n = min(int(a.counts.min()), int(b.counts.min()), ids.shape[1])
        mine, theirs = a.columns[0][..., :n], b.columns[0][..., :n]
        torch.testing.assert_close(
            mine, theirs, rtol=0.05, atol=0.2
        )  # the last token may be scored by one of them only
    assert int(drafted[CACHE].kept(0).max()) <= (12 if policy == "h2o" else 400)


def test_a_second_short_prompt(calls):
    """Several new queries behind a long past: each sees what came before it, padding nothing."""
    model = build("deepseek-v3")
    ids, mask = padded([prompt(40, seed=2)[0], prompt(38, seed=3)[0]], "left")

    def logits():
        cache = model(ids[:, :36], attention_mask=mask[:, :36], use_cache=True)[CACHE]
        return model(ids[:, 36:], attention_mask=mask, **{CACHE: cache}).logits

    before = logits()
    kvcache.wrap(model, "full")
    torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-4)
    assert {shape[2] for shape in calls} == {4}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backends_and_page_sizes(page_size, backend):
    model = build("deepseek-v3")
    before = continued(model, *batch())
    kvcache.wrap(model, POLICIES["wide"], page_size=page_size)
    with ops.use_backend(backend):
        assert torch.equal(continued(model, *batch()), before)


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek-v3", "DeepseekV2ForCausalLM", "LongcatFlashForCausalLM"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", ["one", "left", "right"])
def test_policies_decide_as_where_entries_are_expanded(name, policy, side, calls, monkeypatch):
    if policy == "skipdecode" and name == "LongcatFlashForCausalLM":
        pytest.skip("two cache layers for each decoder layer: no schedule")
    model = build(name) if name == "deepseek-v3" else make(name)
    rows = [prompt(n, seed=n)[0] for n in (40, 25, 33)]
    args = (prompt(40), None) if side == "one" else padded(rows, side)
    absorbed = greedy(kvcache.wrap(model, POLICIES[policy]), *args)
    assert calls
    kvcache.unwrap(model)
    calls.clear()
    expanding(monkeypatch)
    expanded = greedy(kvcache.wrap(model, POLICIES[policy]), *args)
    assert not calls
    assert torch.equal(absorbed.sequences, expanded.sequences)
    a, b = absorbed[CACHE], expanded[CACHE]
    for i, (mine, theirs) in enumerate(zip(a.engine.layers, b.engine.layers)):
        assert torch.equal(a.kept(i), b.kept(i))
        for r in range(a.kept(i).shape[0]):
            assert torch.equal(a.positions(i, r, 0), b.positions(i, r, 0))
        if a.policy.needs:
            n = int(mine.store.counts.min())
            mine, theirs = mine.store.columns[0][..., :n], theirs.store.columns[0][..., :n]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_expanding(dtype, calls, monkeypatch):
    truth = build("deepseek-v3")
    ids, next_token = prompt(60), prompt(1, seed=9)
    cache = truth(ids, use_cache=True)[CACHE]
    exact = truth(next_token, **{CACHE: cache}).logits
    half = copy.deepcopy(truth).to(dtype)

    def error():
        kvcache.wrap(half, "full")
        cache = half(ids, use_cache=True)[CACHE]
        logits = half(next_token, **{CACHE: cache}).logits.float()
        kvcache.unwrap(half)
        return float((logits - exact).detach().abs().mean())

    absorbed = error()
    assert len(calls) == 3
    expanding(monkeypatch)
    assert absorbed <= 1.5 * error() + 1e-3
    assert len(calls) == 3


def test_stored_in_another_dtype(calls):
    model = build("deepseek-v3")
    kvcache.wrap(model, "full", kv_dtype="fp16")
    assert continued(model, prompt(40)).shape == (1, 24)
    assert calls


# --- where it is not taken --------------------------------------------------------------------------------------------


class _Quantised(nn.Linear):
    """A linear layer whose weight is not what it multiplies with."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1))


def _no_plain_matrix(model):
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.__class__ = _Quantised


def _hooked(model):
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: out * 0.5)


def _biased(model):
    for layer in model.model.layers:
        projection = layer.self_attn.kv_b_proj
        projection.bias = nn.Parameter(torch.ones(projection.out_features))


@pytest.mark.parametrize("change", [_no_plain_matrix, _hooked, _biased])
@pytest.mark.parametrize("when", ["before", "after"])
def test_projections_that_are_no_plain_matrix(change, when, calls):
    """Also when that happens to a model that is wrapped already: adapters, offloaded weights."""
    model = build("deepseek-v3")
    if when == "after":
        kvcache.wrap(model, "full")
    change(model)
    if when == "before":
        kvcache.wrap(model, "full")
        assert not model._kvcache_state.plan.absorbed
    got = continued(model, *batch())
    assert not calls
    kvcache.unwrap(model)
    assert torch.equal(got, continued(model, *batch()))


def test_an_expansion_of_another_kind_is_noticed(monkeypatch):
    model = build("deepseek-v3")
    cls = type(model.model.layers[0].self_attn)
    original = cls.expand_kv

    def bent(self, kv_nope, k_rot):
        keys, values = original(self, kv_nope, k_rot)
        return keys, values.tanh()

    monkeypatch.setattr(cls, "expand_kv", bent)
    before = continued(model, prompt(40))
    kvcache.wrap(model, "full")
    assert not model._kvcache_state.plan.absorbed
    assert torch.equal(continued(model, prompt(40)), before)


def test_forwards_that_use_their_keys_otherwise_are_noticed():
    class Plain(nn.Module):
        def forward(self, cache, q, c, r, attention_mask, attention_interface):
            c, r = cache.update(c, r, 0)
            k, v = self.expand_kv(c, r)
            return attention_interface(self, q, k, v, attention_mask)

    class Peeks(Plain):
        def forward(self, cache, q, c, r, attention_mask, attention_interface):
            c, r = cache.update(c, r, 0)
            k, v = self.expand_kv(c, r)
            width = k.shape[-2]
            return attention_interface(self, q, k, v, attention_mask[..., :width])

    class Turns(Plain):
        def forward(self, cache, q, c, r, attention_mask, attention_interface):
            c, r = cache.update(c, r, 0)
            k, v = self.expand_kv(c * 2, r)
            return attention_interface(self, q, k, v, attention_mask)

    assert [mla._passes_expanded(x) for x in (Plain, Peeks, Turns)] == [True, False, False]


def test_a_mask_over_pairs_is_answered_by_expanding(calls):
    model = build("deepseek-v3")
    ids = prompt(30)
    mask = torch.zeros(1, 1, 1, 30)
    mask[..., 5:9] = torch.finfo(torch.float32).min

    def logits():
        cache = model(ids[:, :29], use_cache=True)[CACHE]
        return model(ids[:, 29:], attention_mask=mask, **{CACHE: cache}).logits

    before = logits()
    kvcache.wrap(model, "full")
    torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-4)
    assert not calls


def test_without_a_cache_the_model_expands(calls):
    model = build("deepseek-v3")
    before = model(prompt(20), use_cache=False).logits
    kvcache.wrap(model, "full")
    torch.testing.assert_close(model(prompt(20), use_cache=False).logits, before)
    assert not calls


def test_absorbing_pays_by_hand():
    """DeepSeek-V3's sizes: an entry's expansion costs 131072 multiply-adds per head, reading it absorbed 1088."""
    sizes = {"latent": 512, "rope": 64, "nope": 128, "value": 128}
    assert mla.absorbing_pays(1, 2, **sizes)
    assert not mla.absorbing_pays(1, 1, **sizes)
    assert not mla.absorbing_pays(100, 100, **sizes)  # a prompt
    assert mla.absorbing_pays(100, 4000, **sizes)
    assert not mla.absorbing_pays(200, 4000, **sizes)


# --- what wrap() does to the modules ----------------------------------------------------------------------------------


def test_copies_of_a_wrapped_model_read_their_own_weights(calls):
    model = build("deepseek-v3")
    kvcache.wrap(model, "full")
    before = continued(model, prompt(40))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(-1.0)
    calls.clear()
    assert torch.equal(continued(twin, prompt(40)), before)
    assert calls
    assert not torch.equal(continued(model, prompt(40)), before)


def test_wrapping_again_and_forks(calls):
    model = build("deepseek-v3")
    before = continued(model, prompt(40))
    kvcache.wrap(model, POLICIES["h2o"])
    kvcache.wrap(model, "full")
    cache = greedy(model, prompt(40)[:, :30], new=1)[CACHE]
    for one in (cache.fork(), kvcache.KVCache.import_state(model, cache.export_state())):
        assert torch.equal(continued(model, prompt(40), **{CACHE: one}), before)
    assert calls
