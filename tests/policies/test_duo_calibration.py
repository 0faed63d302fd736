"""The calibration of DuoAttention's heads: what the gates mix, what closes them, and the file that is written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import build, prompt

import kvcache
from kvcache import duo_calibration

STREAMING = {"sinks": 2, "recent": 5}
CLOSED = kvcache.DuoAttention(((False, False),) * 3, **STREAMING)


def hidden(model, ids, gates):
    """Last hidden states of all tokens but the first under ``gates``."""
    with torch.no_grad(), duo_calibration._gated(model, **STREAMING):
        return duo_calibration._last_hidden(model, ids, ids.shape[1] - 1, gates)


def test_closed_gates_are_streaming_heads_and_open_ones_change_nothing():
    """Against the policy itself, token by token, and against the model as it is."""
    model, ids = build("llama-gqa"), prompt(30, seed=2)
    with torch.no_grad():
        expected = model.base_model(ids)[0][:, 1:]
        assert (hidden(model, ids, None) - expected).abs().max() < 1e-5
        assert (hidden(model, ids, torch.ones(3, 2)) - expected).abs().max() < 1e-5
    closed = hidden(model, ids, torch.zeros(3, 2))
    assert (closed - expected).abs().max() > 0.5
    kvcache.wrap(model, CLOSED)
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        steps = [model.base_model(ids[:, t : t + 1], past_key_values=cache)[0] for t in range(30)]
    assert (closed - torch.cat(steps[1:], 1)).abs().max() < 1e-4


def test_a_gate_mixes_the_heads_of_its_kv_head_alone():
    """One layer: the output of the attention module is linear in the gates, and that of other kv heads stays."""
    model, ids = build("llama-gqa", num_hidden_layers=1), prompt(20, seed=2)
    outs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: outs.append(args[0].detach()))
    for gates in ([1.0, 1.0], [1.0, 0.0], [1.0, 0.3]):
        hidden(model, ids, torch.tensor([gates]))
    full, streaming, mixed = (x.unflatten(2, (4, 16)) for x in outs)
    assert torch.equal(full[:, :, :2], streaming[:, :, :2])
    assert (full[:, 8:, 2:] - streaming[:, 8:, 2:]).abs().max() > 0.1
    assert (mixed - (0.3 * full + 0.7 * streaming)).abs().max() < 1e-5


def planted(layer, head):
    """A model of which only one kv head does anything with what lies far back: no other one adds anything."""
    model = build("llama-gqa")
    for i, x in enumerate(model.model.layers):
        for h in range(2):
            if (i, h) != (layer, head):
                x.self_attn.o_proj.weight.data[:, h * 32 : (h + 1) * 32] = 0.0
    return model


@pytest.mark.parametrize(("layer", "head", "kind"), [(0, 1, "json"), (2, 0, "safetensors")])
def test_the_head_that_the_answers_need_stays_open(layer, head, kind, tmp_path):
    model = planted(layer, head)
    texts = [prompt(24, seed=s, rows=2) for s in (2, 3)]
    path = tmp_path / f"heads.{kind}"
    options = {"answer": 4, **STREAMING, "steps": 16, "rate": 0.2, "penalty": 0.002, "share": 1 / 6}
    gates = kvcache.calibrate_duoattention(model, texts, path, **options)
    others = torch.ones(3, 2, dtype=torch.bool)
    others[layer, head] = False
    assert (gates[others] == 0.0).all()
    assert gates[layer, head] > 0.3
    written = torch.tensor(json.loads(path.read_text())) if kind == "json" else load_file(path)["retrieval"]
    assert torch.equal(written, ~others)
    cache = kvcache.KVCache(kvcache.wrap(model, kvcache.DuoAttention(path, **STREAMING)))
    with torch.no_grad():
        model(texts[0], past_key_values=cache)
    assert [cache.kept(i)[0].tolist() for i in range(3)] == torch.where(others, 7, 24).tolist()


def test_without_a_penalty_nothing_closes_and_a_large_one_closes_all(tmp_path):
    model, path = build("llama-gqa"), tmp_path / "heads.json"
    options = {"answer": 4, **STREAMING, "steps": 6, "rate": 0.5}
    gates = kvcache.calibrate_duoattention(model, prompt(24), path, penalty=0.0, **options)
    assert (gates == 1.0).all()
    assert json.loads(path.read_text()) == [[True, True], [True, False], [False, False]]  # half of them: the first ones
    gates = kvcache.calibrate_duoattention(model, prompt(24), path, penalty=100.0, **options)
    assert (gates == 0.0).all()


def test_the_model_is_left_as_it_was(tmp_path):
    model = build("llama-gqa").train()
    model.lm_head.weight.requires_grad_(False)
    before = [(n, p.requires_grad, p.clone()) for n, p in model.named_parameters()]
    state = set(model.__dict__), model.config._attn_implementation
    kvcache.calibrate_duoattention(model, prompt(20), tmp_path / "h.json", answer=3, steps=2, **STREAMING)
    assert (set(model.__dict__), model.config._attn_implementation) == state
    assert model.training
    for (name, wanted, value), p in zip(before, model.parameters(), strict=True):
        assert p.requires_grad == wanted, name
        assert p.grad is None
        assert torch.equal(p, value)
    assert not vars(duo_calibration._local)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "heads.txt"}, "path must end in .json or .safetensors"),
        ({"input_ids": prompt(9)[0]}, r"input_ids must be token ids \[rows, tokens\]"),
        ({"answer": 0}, "answer must be at least 1, got 0"),
        ({"answer": 20}, "answer must be less than the tokens of every text, got 20"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"rate": -1}, "rate must be a number of at least 0, got -1"),
        ({"penalty": "much"}, "penalty must be a number of at least 0, got 'much'"),
        ({"recent": 0}, "recent must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"model": "mistral"}, "MistralForCausalLM has layers with a sliding window"),
        ({"model": "deepseek-v3"}, "DeepseekV3ForCausalLM has layers without queries and keys of their own"),
    ],
)
def test_what_cannot_be_calibrated_is_named(changes, message, tmp_path):
    given = {"model": "llama-gqa", "input_ids": prompt(20), "path": "heads.json", "answer": 4, **changes}
    model = build(given.pop("model"))
    ids, path = given.pop("input_ids"), tmp_path / given.pop("path")
    with pytest.raises(ValueError, match=message):
        kvcache.calibrate_duoattention(model, ids, path, **given)
    assert not list(tmp_path.iterdir())


def test_wrapped_models_and_others_are_refused(tmp_path):
    model = kvcache.wrap(build("llama-gqa"))
    with pytest.raises(ValueError, match="LlamaForCausalLM is wrapped"):
        kvcache.calibrate_duoattention(model, prompt(20), tmp_path / "heads.json", answer=3)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel"):
        kvcache.calibrate_duoattention(torch.nn.Linear(2, 2), prompt(20), tmp_path / "heads.json", answer=3)
