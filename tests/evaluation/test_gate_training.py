"""Training of retention gates: the loss is the paper's, the model stays as it is, resumed is uninterrupted."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.models import build, greedy, prompt

import kvcache
from kvcache import Gates, gate_attention
from kvcache.cli import main
from kvcache.evaluation.gate_data import batches_for
from kvcache.evaluation.loading import load_tokenizer
from kvcache.evaluation.tiny_models import tiny_model
from kvcache.gate_attention import capacity_loss, forward
from kvcache.gate_training import GateRecipe, gate_shapes, losses, train_gates
from kvcache.layers import hidden_modules
from kvcache.tiers import plan_layers

TINY = {"steps": 6, "length": 24, "batch": 2, "width": 4, "capacity": 4, "bias": 3.0, "lr": 0.05}


def batches(step):
    ids = prompt(24, seed=step, rows=2)
    weights = torch.full(ids.shape, 1 / 46)
    weights[:, 0] = 0
    return ids, weights


def modules_of(model):
    return hidden_modules(model, plan_layers(model), "a test")


def lively(model, bias=2.0, seed=0):
    """Gates whose betas differ from token to token and from head to head."""
    gates = Gates(gate_shapes(model, modules_of(model)), width=4, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.layers.values():
            gate.outer.weight.normal_(0, 2, generator=generator)
    return gates


@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-mqa", "llama-mha", "qwen3-moe", "mistral", "gemma2", "gpt-oss", "gpt2"]
)
def test_gates_that_forget_nothing_leave_the_model_as_it_is(name):
    model = build(name)
    ids = prompt(24, rows=2)
    with torch.no_grad():
        expected = model(ids).logits
        with gate_attention.exchanged(model, modules_of(model)):
            teacher, none = forward(model, ids)
            gates = Gates(gate_shapes(model, modules_of(model)), width=4, bias=200.0)
            student, excess = forward(model, ids, gates, 4)
    # Experts and sinks of GPT-OSS amplify rounding.
    tolerance = 5e-4 if name == "gpt-oss" else 5e-5
    assert (teacher - expected).abs().max() < tolerance
    assert torch.equal(student, teacher)
    assert none == 0
    # All of min(t, window) entries remembered, of which 4 are free.
    windows = [16 if w else 24 for w in plan_layers(model).windows]
    wanted = sum(max(min(t, w) - 4, 0) / t for w in windows for t in range(1, 25)) / 24 / len(windows)
    assert excess.item() == pytest.approx(wanted, abs=1e-5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_what_a_head_forgets_is_gone_from_its_own_group_alone():
    """Against attention written anew: query head h fades by kv head h // group, by (t - i) log beta."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 7, 5, generator=generator) for h in (6, 2, 2))

    class Module(torch.nn.Module):
        layer_idx = 0

    gates = Gates({0: (3, 2)}, width=4, bias=0.5)
    with torch.no_grad():
        gates.layers["0"].outer.weight.normal_(0, 2, generator=generator)
    hidden = torch.randn(1, 7, 3, generator=generator)
    gate_attention._run = gate_attention._Run(gates, 2, {0: hidden})
    try:
        out, _ = gate_attention.fading_attention(Module(), q, k, v, None, scaling=0.3)
        (excess,) = gate_attention._run.excess
    finally:
        gate_attention._run = gate_attention._Run()
    log_beta = gates.log_beta(0, hidden)[0].detach()
    total = 0.0
    for h in range(6):
        for t in range(7):
            logits = [0.3 * q[0, h, t] @ k[0, h // 3, i] + (t - i) * log_beta[h // 3, i] for i in range(t + 1)]
            expected = torch.stack(logits).softmax(0) @ v[0, h // 3, : t + 1]
            assert torch.allclose(out[0, t, h], expected, atol=1e-6)
    for g in range(2):
        for t in range(7):
            size = sum(math.exp((t - i) * log_beta[g, i]) for i in range(t + 1))
            total += max(size - 2, 0) / (t + 1) / 14
    assert excess.item() == pytest.approx(total, abs=1e-6)


def test_the_capacity_loss_of_an_example():
    """beta of .5 and .25, then the newest: sizes 1, 1.5, 1 + .25 + .25 at t = 1, 2, 3; what exceeds 1 by t."""
    log = torch.tensor([0.5, 0.25, 0.9]).log()
    age = (torch.arange(3)[:, None] - torch.arange(3)).float()
    fading = (age * log).masked_fill(age < 0, -math.inf)[None, None]
    assert capacity_loss(fading, 1).item() == pytest.approx((0 + 0.5 / 2 + 0.5 / 3) / 3)


def test_losses_and_where_their_gradient_goes():
    model = build("llama-gqa")
    gates = lively(model)
    ids, weights = batches(0)
    with gate_attention.exchanged(model, modules_of(model)):
        kl, ce, excess = losses(model, gates, ids, weights, 2)
        with torch.no_grad():
            teacher, student = (forward(model, ids, g, 2)[0][:, :-1] for g in (None, gates))
        for loss in (kl, ce, excess):
            gates.zero_grad()
            loss.backward(retain_graph=True)
            assert all(bool(p.grad.abs().sum() > 0) for p in gates.parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert kl.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert ce.item() == pytest.approx(F.cross_entropy(student.flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-5)
    assert kl.item() > 0.1


def test_training_lowers_the_loss_and_touches_nothing_but_gates(tmp_path):
    model = build("llama-gqa").train()
    model.lm_head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    seen = []
    gates = train_gates(
        model, tmp_path / "g.safetensors", batches=lambda step: batches(0), progress=lambda *x: seen.append(x),
        **{**TINY, "steps": 30},
    )  # fmt: skip
    assert [n for n, _ in seen] == list(range(1, 31))
    first, last = (sum(values.values()) for values in (seen[0][1], seen[-1][1]))
    assert last < first - 0.5, (seen[0], seen[-1])
    assert seen[-1][1]["capacity"] < 0.5 * seen[0][1]["capacity"]
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    file = Gates.load(tmp_path / "g.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(file.parameters(), gates.parameters()))
    assert file.metadata["model"] == "LlamaForCausalLM"
    assert (file.metadata["capacity"], file.metadata["steps"], file.metadata["seed"]) == ("4", "30", "0")
    assert file.metadata["shapes"] == '{"0": [64, 2], "1": [64, 2], "2": [64, 2]}'
    kvcache.wrap(model.eval(), kvcache.TrimKV(str(tmp_path / "g.safetensors"), 8))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: build("qwen3").to(torch.bfloat16), [0, 1, 2]),
        (lambda: tiny_model(transformers.Qwen3NextForCausalLM, "qwen3_next").eval(), [1]),
    ],
    ids=["bfloat16", "some layers recurrent"],
)
def test_other_models_train_and_serve(make, layers, tmp_path):
    model, file = make(), str(tmp_path / "g")
    gates = train_gates(model, file, batches=batches, **{**TINY, "steps": 2})
    assert list(gates.shapes) == layers
    kvcache.wrap(model, f"trimkv(gates={file!r}, keep=6, slack=0)")
    cache = greedy(model, prompt(20, rows=2), None, 4).past_key_values
    assert all((cache.kept(i) == 6).all() and cache.kept(i).numel() for i in layers)


class Interrupted(Exception):
    pass


def stop_after(n):
    def progress(step, values):
        if step == n:
            raise Interrupted

    return progress


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_training_is_the_same_bit_for_bit(stop, tmp_path):
    model = build("qwen3", num_hidden_layers=2)
    whole = train_gates(model, tmp_path / "whole", batches=batches, **TINY)
    part = tmp_path / "part"
    with pytest.raises(Interrupted):
        train_gates(model, part, batches=batches, save_every=2, progress=stop_after(stop), **TINY)
    assert not part.exists()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="part.state is of an interrupted training: resume it, or remove that file"):
        train_gates(model, part, batches=batches, **TINY)
    with pytest.raises(ValueError, match="was begun with lr=0.05, not 0.01"):
        train_gates(model, part, batches=batches, resume=True, **{**TINY, "lr": 0.01})
    with pytest.raises(ValueError, match="was begun with data="):
        train_gates(model, part, batches=lambda step: batches(step + 1), resume=True, **TINY)
    steps = []
    torch.rand(3)  # a training takes nothing from the generator of the process
    again = train_gates(model, part, batches=batches, resume=True, progress=lambda n, _: steps.append(n), **TINY)
    assert steps[0] == stop // 2 * 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "whole"]
    other = train_gates(model, tmp_path / "other", batches=batches, **{**TINY, "seed": 1})
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters()))


def test_what_train_gates_refuses(tmp_path):
    model = build("llama-gqa")
    out = tmp_path / "g"
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got int"):
        train_gates(3, out)
    with pytest.raises(TypeError, match="width must be an int, got 2.5"):
        train_gates(model, out, width=2.5)
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        train_gates(model, out, length=1)
    with pytest.raises(ValueError, match="lr must be a positive number, got 0"):
        train_gates(model, out, lr=0)
    with pytest.raises(TypeError, match="bias must be a number, got '8'"):
        train_gates(model, out, bias="8")
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        train_gates(model, out, layers=2)
    with pytest.raises(ValueError, match="there is no .*g.state: nothing to resume"):
        train_gates(model, out, batches=batches, resume=True)
    with pytest.raises(ValueError, match="train_gates needs the hidden states.*MLA"):
        train_gates(build("deepseek-v3"), out, batches=batches)
    with pytest.raises(ValueError, match="layer 2 of Gemma3nForCausalLM reads another layer's entries"):
        train_gates(tiny_model(transformers.Gemma3nForCausalLM, "gemma3n_text"), out, batches=batches)
    with pytest.raises(ValueError, match="this LlamaForCausalLM comes from no folder; pass one, or batches"):
        train_gates(model, out)
    kvcache.wrap(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is wrapped: call kvcache.unwrap"):
        train_gates(model, out, batches=batches)
    assert not list(tmp_path.iterdir())


# -- data and the command -------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words, of five letters at most: ids by first come, 1 in front of every text."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens=True):
        ids = [self.known.setdefault(w, len(self.known) + 2) for w in re.findall(r"\S{1,5}", text)]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


@pytest.mark.parametrize("kind", ["bytes", "words", "text"])
def test_data_is_drawn_from_seed_and_step(kind):
    recipe = GateRecipe(length=64, batch=3)
    text = " ".join(f"w{i}" for i in range(300)) if kind == "text" else None
    tokenizer = load_tokenizer() if kind == "bytes" else Words()
    model = build("llama-gqa")
    draw = batches_for(model, recipe, text, tokenizer)
    tokens, weights = draw(4)
    assert tokens.shape == weights.shape == (3, 64)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == 1).all()
    assert (weights[:, 0] == 0).all()
    assert weights.sum().item() == pytest.approx(2.0 if kind == "bytes" else 1.0)
    again, _ = batches_for(model, recipe, text, tokenizer)(4)
    assert torch.equal(again, tokens)
    assert not torch.equal(draw(5)[0], tokens)
    if kind == "text":
        assert (tokens[:, 1:].diff() == 1).all()  # windows of the text
        with pytest.raises(ValueError, match="text has 3 tokens, fewer than a sequence of length=64"):
            batches_for(model, recipe, "w0 w1 w2", tokenizer)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    given = ["train-gates", "--out", str(out), "--steps", "3", "--length", "48", "--batch", "2", "--width", "4"]
    assert main([*given, "--capacity", "8", "--lr", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "step 3  kl" in shown
    assert f"trimkv(gates='{out}', keep=8)" in "".join(shown.split("\n"))
    gates = Gates.load(out)
    assert gates.shapes == dict.fromkeys(range(4), (192, 2))
    assert gates.metadata["lr"] == "0.01"
    for more, message in (
        (["--text", str(tmp_path / "none")], "there is no file"),
        (["--resume"], "nothing to resume"),
        (["--batch", "0"], "batch must be at least 1"),
    ):
        assert main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    assert main([*given, "--text", str(tmp_path / "text"), "--seed", "1"]) == 0
    assert Gates.load(out).metadata["seed"] == "1"
