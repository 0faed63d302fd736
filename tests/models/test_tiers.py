"""Models in tiers other than the paged handle: they compute attention themselves, keep recurrent states, share entries.

The oracle of eviction is the handle tier, which tests/oracles checks against dense attention: the same model, made to
compute attention itself, must evict, score and generate the same.
"""

import copy
import pickle

import pytest
import torch
import transformers
from support.models import GQA, SPECIAL, build, continued, enliven, greedy, padded, prompt
from transformers import AutoModelForCausalLM

import kvcache
from kvcache import tiers
from kvcache.attention import CACHE

COMMON = {"vocab_size": 97, **SPECIAL}
SMALL = {**COMMON, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}

CONFIGS = {
    "bloom": lambda: transformers.BloomConfig(**COMMON, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(**COMMON, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    "falcon": lambda: transformers.FalconConfig(**SMALL),
    "falcon-alibi": lambda: transformers.FalconConfig(**SMALL, alibi=True),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        **COMMON,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=512,
    ),
    "xglm": lambda: transformers.XGLMConfig(
        **COMMON, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, max_position_embeddings=512
    ),
    "doge": lambda: transformers.DogeConfig(**{**GQA, "num_hidden_layers": 2}),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **{**GQA, "num_hidden_layers": 4},
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **{**GQA, "num_hidden_layers": 4},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "falcon-h1": lambda: transformers.FalconH1Config(
        **{**GQA, "num_hidden_layers": 2},
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **{**GQA, "num_hidden_layers": 5},
        head_dim=16,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        activation_sparsity_pattern=None,
    ),
}
SELF_ATTENDING = ("bloom", "mpt", "falcon", "falcon-alibi", "gpt-neo", "xglm", "doge")
STATEFUL = ("qwen3-next", "jamba", "falcon-h1")
WIDE = "h2o(heavy=300, recent=100)"  # scores, but never evicts


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    enliven(model)
    return model


def batch():
    return padded([prompt(n, seed=n)[0] for n in (40, 25, 33)], "left")


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_unwrapped_model(name):
    model = make(name)
    one, (ids, mask) = prompt(40), batch()
    before = continued(model, one), continued(model, ids, mask)
    for policy in ("full", WIDE):
        kvcache.wrap(model, policy)
        assert torch.equal(continued(model, one), before[0])
        assert torch.equal(continued(model, ids, mask), before[1])
    expected = {"pre-hook"} if name in SELF_ATTENDING else {"handle", "own"}
    assert set(model._kvcache_state.tiers.values()) <= expected
    kvcache.unwrap(model)
    assert torch.equal(continued(model, one), before[0])
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("policy", ["streamingllm(sinks=2, window=10)", "h2o(heavy=6, recent=6)"])
def test_a_budget_is_kept_and_a_padded_row_is_its_own_run(name, policy):
    model = kvcache.wrap(make(name), policy)
    rows = [prompt(n, seed=n)[0] for n in (40, 25)]
    out = greedy(model, *padded(rows, "left"))
    if CACHE not in out:
        pytest.skip("MPT of transformers 5.24 returns no cache, so generate() starts anew at every step")
    cache = out[CACHE]
    for layer, tier in model._kvcache_state.tiers.items():
        assert tier == "own" or int(cache.kept(layer).max()) <= 12
    if name in ("bloom", "falcon-alibi", "doge", *STATEFUL):
        return  # ALiBi, Doge's own mask and recurrent states see padding, with and without kvcache
    for r, row in enumerate(rows):
        assert torch.equal(out.sequences[r, 40:], continued(model, row[None])[0])


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "mistral", "gemma2", "opt", "deepseek-v3"])
@pytest.mark.parametrize(
    "policy",
    [
        "full",
        "streamingllm(sinks=2, window=10)",
        "h2o(heavy=6, recent=6)",
        'h2o(heavy=6, recent=6, group_reduction="max")',
        "skipdecode(min_layers=1, max_layers=2, horizon=64)",
    ],
)
@pytest.mark.parametrize("side", ["one", "left"])
def test_the_same_model_computing_attention_itself(name, policy, side, monkeypatch):
    if "group_reduction" in policy:
        policy = kvcache.H2O(heavy=6, recent=6, group="max")
        if name == "deepseek-v3":
            pytest.skip("one latent head against many expanded ones: the maxima are of different things")
    args = (prompt(40), None) if side == "one" else batch()
    model = build(name)
    kvcache.wrap(model, policy)
    handle = greedy(model, *args)
    kvcache.unwrap(model)
    monkeypatch.setattr(tiers, "_interface_tiers", lambda model, paged: (None, "made to"))
    kvcache.wrap(model, policy)
    assert set(model._kvcache_state.tiers.values()) == {"pre-hook"}
    own = greedy(model, *args)
    assert torch.equal(own.sequences, handle.sequences)
    a, b = handle[CACHE], own[CACHE]
    for i in range(len(a.layers)):
        assert torch.equal(a.kept(i), b.kept(i))
        for r in range(a.kept(i).shape[0]):
            for h in range(a.kept(i).shape[1]):
                assert torch.equal(a.positions(i, r, h), b.positions(i, r, h))


@pytest.mark.parametrize("name", ["bloom", "gpt-neo", "falcon"])
def test_drafts_and_beams_of_models_that_compute_attention_themselves(name):
    model = make(name)
    ids = prompt(12).repeat(1, 3)
    before = continued(model, ids, num_beams=3)
    kvcache.wrap(model, "full")
    assert torch.equal(continued(model, ids, num_beams=3), before)
    kvcache.wrap(model, WIDE)
    plain = greedy(model, ids)
    drafted = greedy(model, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(plain.sequences, drafted.sequences)
    a, b = plain[CACHE].engine.layers[0].store, drafted[CACHE].engine.layers[0].store
    n = min(int(a.counts.min()), int(b.counts.min()))
    torch.testing.assert_close(a.columns[0][..., :n], b.columns[0][..., :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATEFUL)
def test_forks_beams_and_saved_caches_carry_recurrent_states(name):
    model = make(name)
    ids = prompt(40)
    # What transformers makes of a kept cache: Jamba's states do not continue over several new tokens.
    kept = greedy(model, ids[:, :30], new=1)[CACHE]
    before = continued(model, ids, **{CACHE: kept}), continued(model, ids, num_beams=3)
    kvcache.wrap(model, "full")
    assert torch.equal(continued(model, ids, num_beams=3), before[1])
    cache = greedy(model, ids[:, :30], new=1)[CACHE]
    copies = [cache.fork(), copy.deepcopy(cache)]
    state = pickle.loads(pickle.dumps(cache.export_state()))
    copies.append(kvcache.KVCache.import_state(model, state))
    for one in (*copies, cache):
        assert one.seen_tokens == 30
        assert torch.equal(continued(model, ids, **{CACHE: one}), before[0])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_failed_forward_ends_a_cache_with_recurrent_states(name):
    model = make(name)
    kvcache.wrap(model, "full")
    ids = prompt(40)
    before = continued(model, ids)
    cache = greedy(model, ids, new=2)[CACHE]

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        model(prompt(1), **{CACHE: cache})
    with pytest.raises(RuntimeError, match="half way"):
        continued(model, ids)
    hook.remove()
    with pytest.raises(RuntimeError, match="recurrent states"):
        model(prompt(1), **{CACHE: cache})
    cache.reset()
    assert torch.equal(continued(model, ids, **{CACHE: cache}), before)
    assert torch.equal(continued(model, ids), before)


def test_layers_that_share_entries_keep_no_state_of_their_own():
    """Drafts are taken back, and a failed forward is undone, as where every layer is paged."""
    model = make("gemma3n")
    ids = prompt(12).repeat(1, 3)
    before = continued(model, ids)
    kvcache.wrap(model, "full")
    assert torch.equal(continued(model, ids, prompt_lookup_num_tokens=4), before)
    cache = greedy(model, ids, new=2)[CACHE]

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        model(before[:, 1:2], **{CACHE: cache})
    hook.remove()
    assert torch.equal(model(before[:, 1:2], **{CACHE: cache}).logits[:, -1].argmax(-1), before[:, 2])


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("bloom", "tokenselect", "selection.*Bloom.*itself"),
        ("jamba", "skipdecode(min_layers=1, max_layers=2, horizon=64)", "Jamba.*layer 0.*recurrent"),
        ("falcon-h1", "skipdecode(min_layers=1, max_layers=2, horizon=64)", "FalconH1.*layer 0.*recurrent"),
        ("gemma3n", "skipdecode(min_layers=1, max_layers=2, horizon=64)", "Gemma3n.*skipped"),
    ],
)
def test_policies_that_such_models_cannot_serve(name, policy, message):
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(make(name), policy)


def test_attention_without_a_softmax_is_found_out(monkeypatch):
    model = make("bloom")
    module = transformers.models.bloom.modeling_bloom
    monkeypatch.setattr(module.F, "softmax", lambda x, dim, dtype=None: x.exp() / x.exp().sum(dim, keepdim=True))
    kvcache.wrap(model, "streamingllm(sinks=1, window=4)")
    with pytest.raises(RuntimeError, match="BloomAttention.*cannot hide"):
        greedy(model, prompt(20))


def test_flash_attention_cannot_be_watched():
    model = make("bloom")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        kvcache.wrap(model)
