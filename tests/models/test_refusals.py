"""Models that kvcache cannot serve are refused by ``wrap``, by name, and stay as they were."""

import pytest
import torch
import transformers
from support.models import BASE, SPECIAL, build, prompt
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import kvcache
from kvcache.evaluation.compatibility import classes
from kvcache.evaluation.tiny_models import tiny_model

SMALL = {**BASE, "num_hidden_layers": 2}


def mamba():
    return transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, **SPECIAL)


def t5():
    return transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)


CASES = {
    "mamba": (mamba, "Mamba.*layer 0"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CpmAntForCausalLM", "CpmAntForCausalLM caches a learned prompt"),
        ("DoryForCausalLM", "DoryForCausalLM runs layers in a loop"),
        ("XLMWithLMHeadModel", "XLMWithLMHeadModel is given all tokens at every step"),
    ],
)
def test_models_that_use_a_cache_as_no_other_does(name, message):
    if name not in classes():
        pytest.skip(f"transformers {transformers.__version__} has no {name} in its causal-LM mapping")
    model = tiny_model(getattr(transformers, name), classes()[name])
    before = sorted(model.__dict__)
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model)
    assert sorted(model.__dict__) == before


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
