"""Models that kvcache cannot serve are refused by ``wrap``, by name, and stay as they were."""

import pytest
import torch
import transformers
from support.models import BASE, SPECIAL, build, prompt
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import kvcache

SMALL = {**BASE, "num_hidden_layers": 2}


def bloom():
    return transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4, **SPECIAL)


def mpt():
    return transformers.MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, max_seq_len=128, **SPECIAL)


def mamba():
    return transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, **SPECIAL)


def qwen3_next():
    return transformers.Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def jamba():
    return transformers.JambaConfig(
        **{**SMALL, "num_hidden_layers": 4},
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )


def gemma3n():
    return transformers.Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 5, "vocab_size": 97},
        num_key_value_heads=2,
        head_dim=16,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        activation_sparsity_pattern=None,
    )


def t5():
    return transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)


CASES = {
    "bloom": (bloom, "Bloom.*layer 0.*BloomAttention"),
    "mpt": (mpt, "Mpt"),
    "mamba": (mamba, "Mamba.*layer 0"),
    "qwen3-next": (qwen3_next, "Qwen3Next.*layer 0"),
    "jamba": (jamba, "Jamba.*layer 0"),
    "gemma3n": (gemma3n, "Gemma3n.*layer"),
    "t5": (t5, "T5ForConditionalGeneration.*decoder-only"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name_and_untouched(name):
    make, message = CASES[name]
    config = make()
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    ids = prompt(12)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        logits = model(ids, **more).logits
    before = (sorted(model.__dict__), model.config.to_dict(), model.config._attn_implementation)
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model)
    assert (sorted(model.__dict__), model.config.to_dict(), model.config._attn_implementation) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids, **more).logits, logits)


def test_things_that_are_no_transformers_model():
    with pytest.raises(TypeError, match="PreTrainedModel.*Linear"):
        kvcache.wrap(nn.Linear(2, 2))
    encoder = transformers.BertModel(
        transformers.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="BertModel.*decoder-only"):
        kvcache.wrap(encoder)


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("mistral", 'tokenselect(positions="compact")', "compact.*Mistral.*sliding"),
        ("gpt2", 'tokenselect(positions="compact")', "rotary.*GPT2"),
        ("deepseek-v3", "tokenselect", "selection.*DeepseekV3.*MLA"),
        ("qwen3", "skipdecode", "max_layers=22.*3 decoder layers"),
    ],
)
def test_a_policy_that_the_model_cannot_serve_is_refused_at_wrap(name, policy, message):
    model = build(name)
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model, policy)
    assert model._kvcache_state is None if hasattr(model, "_kvcache_state") else True
    assert model.config._attn_implementation == "sdpa" or model.config._attn_implementation == "eager"
    # A refusal leaves an earlier wrap in force.
    kvcache.wrap(model, "streamingllm(sinks=1, window=4)")
    state = model._kvcache_state
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model, policy)
    assert model._kvcache_state is state
