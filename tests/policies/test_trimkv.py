"""TRIM-KV: gates see what enters attention, and what every head keeps is what they say, written anew over the hidden
states of one dense forward of the unwrapped model."""

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dense import Replay, dense_logits
from support.engines import engine, held, unit
from support.gates import random_gates
from support.models import build, greedy, padded
from support.runs import kept, own_log, run
from transformers import BloomForCausalLM

import kvcache
from kvcache import Gates, TrimKV
from kvcache.evaluation.tiny_models import tiny_model
from kvcache.step import Attention

PROMPT, TOTAL, LAYERS = 44, 66, 3
HEADS = {"llama-gqa": 2, "llama-mqa": 1, "llama-mha": 4, "qwen3": 2}


def tokens(seed=6):
    return (torch.randperm(94, generator=torch.Generator().manual_seed(seed))[:TOTAL] + 3)[None]


def policy_for(name="llama-gqa", keep=10, **options):
    return TrimKV(random_gates(LAYERS, HEADS[name]), keep, **{"slack": 0, **options})


# -- the rule, written anew -----------------------------------------------------------------------------------------


def log_betas(file, hidden):
    """[layer][head][token] from the tensors of ``file`` and the hidden states [T, size] of every layer."""
    t = {k: v.double() for k, v in load_file(file).items()}
    out = []
    for i in range(len(hidden)):
        inner = hidden[i].double() @ t[f"layers.{i}.inner.weight"].T + t[f"layers.{i}.inner.bias"]
        outer = (inner * torch.sigmoid(inner)) @ t[f"layers.{i}.outer.weight"].T + t[f"layers.{i}.outer.bias"]
        out.append((-torch.log1p(torch.exp(-outer))).T.tolist())
    return out


def simulate(policy, betas, prompt, total):
    """kept[n][layer][head]: positions after ``n`` tokens, of which the first ``prompt`` came together."""
    spots = [(i, h) for i in range(len(betas)) for h in range(len(betas[0]))]
    keep = int(policy.keep * prompt) if isinstance(policy.keep, float) else policy.keep
    recent = int(policy.recent * prompt) if isinstance(policy.recent, float) else policy.recent
    holds, budgets, log = {s: [] for s in spots}, {}, {}

    def worth(spot, p, n):
        safe = p < policy.sinks or p >= n - recent
        return math.inf if safe else (n - p) * betas[spot[0]][spot[1]][p]

    def best(spot, n):
        return sorted(holds[spot], key=lambda p: (-worth(spot, p, n), p))

    def share_out(n):
        total = keep * len(spots)
        sure = {(s, p) for s in spots for p in best(s, n)[: max(int(policy.floor * keep), 1)]}
        rest = [(s, p) for s in spots for p in holds[s] if (s, p) not in sure]
        rest.sort(key=lambda e: (-worth(*e, n), spots.index(e[0]), e[1]))
        chosen = sure | set(rest[: total - len(sure)])
        spare = total - len(chosen)
        for i, s in enumerate(spots):
            extra = spare // len(spots) + (i < spare % len(spots))
            budgets[s] = sum(spot == s for spot, _ in chosen) + extra

    for n in range(1, total + 1):
        for s in spots:
            holds[s].append(n - 1)
        if n < prompt:
            continue
        slack = 0 if n == prompt else policy.slack
        if policy.allocation == "head":
            budgets = dict.fromkeys(spots, keep)
        elif n == prompt or any(len(holds[s]) > budgets[s] + slack for s in spots):
            share_out(n)
            slack = 0
        for s in spots:
            if len(holds[s]) > budgets[s] + slack:
                holds[s] = sorted(best(s, n)[: budgets[s]])
        log[n] = [[list(holds[i, h]) for h in range(len(betas[0]))] for i in range(len(betas))]
    return log


def agrees(model, policy, ids, log, prompt, total, shift=0, row=0):
    """``log`` of a run is the rule's, on the hidden states of a dense forward under the log's own visibility."""
    hidden = {}

    def note(i):
        return lambda module, args, kwargs: hidden.update({i: (args[0] if args else kwargs["hidden_states"])[0]})

    attention = [layer.self_attn for layer in model.model.layers]
    handles = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(attention)]
    own = {t - shift: kept_[row] for t, kept_ in log.items()}
    logits = dense_logits(model, ids[:, :total], Replay(own))
    for handle in handles:
        handle.remove()
    expected = simulate(policy, log_betas(policy.gates, hidden), prompt, total)
    for n in range(prompt, total + 1):
        assert own[n] == expected[n], n
    return logits, expected


CASES = {
    "head": {},
    "protected": {"sinks": 2, "recent": 3},
    "slack": {"slack": 6, "sinks": 1},
    "share": {"keep": 0.25, "slack": 3},
    "global": {"allocation": "global"},
    "global-slack": {"allocation": "global", "slack": 5, "recent": 2, "sinks": 1},
    "global-floor": {"allocation": "global", "slack": 4, "floor": 0.5},
    "global-even": {"allocation": "global", "slack": 2, "floor": 1.0},
}


OTHERS = [(case, name) for case in ("protected", "global-slack") for name in HEADS if name != "llama-gqa"]


@pytest.mark.parametrize(("case", "name"), [*((case, "llama-gqa") for case in CASES), *OTHERS])
def test_every_head_keeps_what_its_gate_says(case, name):
    policy = policy_for(name, **CASES[case])
    model = kvcache.wrap(build(name), policy, page_size=4)
    result = run(model, tokens(), PROMPT)
    kvcache.unwrap(model)
    logits, expected = agrees(model, policy, tokens(), result.log, PROMPT, TOTAL)
    assert (result.logits[0] - logits).abs().max() < 5e-5
    chosen = {tuple(head) for layer in result.log[TOTAL][0] for head in layer}
    assert len(chosen) > 1, "all heads keep the same: the test says nothing"
    counts = {len(head) for layer in expected[TOTAL] for head in layer}
    assert (len(counts) > 1) == (policy.allocation == "global" and policy.floor < 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["share", "global-slack"])
def test_rows_of_a_padded_batch(case, side):
    """Under "global", rows share out their own totals at times of their own: one is shorter than its budget."""
    policy = policy_for(**CASES[case])
    lengths, new = (PROMPT, 29, 7), 20
    rows = [tokens(seed=6 + i) for i in range(3)]
    ids, mask = padded([row[0, :n] for row, n in zip(rows, lengths)], side)
    later = torch.cat([row[:, n : n + new] for row, n in zip(rows, lengths)])
    real = torch.cat([mask, torch.ones_like(later)], 1)
    model = kvcache.wrap(build("llama-gqa"), policy, page_size=4)
    log = run(model, torch.cat([ids, later], 1), PROMPT, real).log
    kvcache.unwrap(model)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        agrees(model, policy, row, log, n, n + new, PROMPT - n, r)


# -- the paper's examples, by hand ----------------------------------------------------------------------------------


def gates_of_one_channel():
    """Gates of one layer and head that take a hidden state h to sigmoid(silu(h))."""
    gates = Gates({0: (1, 1)}, width=1, bias=0.0)
    with torch.no_grad():
        gates.layers["0"].inner.weight.fill_(1.0)
        gates.layers["0"].outer.weight.fill_(1.0)
    return gates


def hidden_for(betas):
    """Hidden states [1, T, 1] which those gates give ``betas`` of at least 1/2."""
    out = []
    for beta in betas:
        low, high = 0.0, 40.0
        for _ in range(60):
            h = (low + high) / 2
            low, high = (h, high) if h / (1 + math.exp(-h)) < math.log(beta / (1 - beta)) else (low, h)
        out.append(low)
    return torch.tensor(out)[None, :, None]


def feed(e, betas):
    """Tokens of these betas in one forward."""
    (layer,) = e.layers
    k = unit(0).expand(1, 1, len(betas), -1).contiguous()
    e.begin(1, len(betas), None)
    layer.hidden = hidden_for(betas)
    e.append(layer, k, k, e.step)
    layer.new = (k, k)
    e.attend(layer, k, Attention(scale=1.0))
    e.finish()


def test_the_papers_example(backend):
    """beta ** age = .9606, .125, .81, .999 of four tokens: two best."""
    e = engine(TrimKV(gates_of_one_channel(), 2, slack=0))
    feed(e, [0.99, 0.5, 0.9, 0.999])
    assert held(e) == [0, 3]
    left = (e.layers[0].view().column("log_beta")[0, 0, :2] * (4 - e.layers[0].store.positions[0, 0, :2])).exp()
    assert left.tolist() == pytest.approx([0.9606, 0.999], abs=1e-4)


@pytest.mark.parametrize(("count", "stays"), [(11, 10), (12, 0)])
def test_a_slow_fader_overtakes(count, stays, backend):
    """A of .99 at position 0 and B of .9 at position 10 cross at t = 11.05: .895 < .900, then .886 > .810."""
    e = engine(TrimKV(gates_of_one_channel(), 1, slack=0))
    feed(e, [0.99, *[0.5] * 9, 0.9, 0.5][:count])
    assert held(e) == [stays]


def test_scores_are_not_kept(backend):
    """B stays at t = 11 as the better one, and leaves at t = 12 as the worst, though nothing about it was written."""
    e = engine(TrimKV(gates_of_one_channel(), 2, slack=0))
    feed(e, [0.99, *[0.5] * 9, 0.9])
    assert held(e) == [0, 10]
    feed(e, [0.95])
    assert held(e) == [0, 11]


def test_equal_gates_leave_the_newest(backend):
    e = engine(TrimKV(gates_of_one_channel(), 3, slack=0))
    feed(e, [0.9] * 8)
    assert held(e) == [5, 6, 7]


# -- totals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("slack", [0, 3])
def test_a_shared_total_is_exact_and_its_pages_are_real(slack, page_size):
    policy = policy_for(allocation="global", slack=slack)
    model = kvcache.wrap(build("llama-gqa"), policy, page_size=page_size)
    result = run(model, tokens(), PROMPT)
    total = 10 * LAYERS * 2
    sums = [sum(len(h) for layer in log[0] for h in layer) for _, log in sorted(result.log.items())]
    assert sums == [total + LAYERS * 2 * (n % (slack + 1)) for n in range(TOTAL - PROMPT + 1)]
    (storage,) = result.cache.engine.storages.values()
    counts = torch.stack([result.cache.kept(i) for i in range(LAYERS)])
    assert storage.pool.used == int((-(-counts // page_size)).sum())
    assert counts.min() >= 1
    assert counts.max() > 10


def test_a_short_prompt_leaves_its_room_to_all():
    policy = policy_for(keep=12, allocation="global", slack=2)
    model = kvcache.wrap(build("llama-gqa"), policy, page_size=4)
    log = run(model, tokens(), 7).log
    for n in range(7, 15):
        assert all(head == list(range(n)) for layer in log[n][0] for head in layer)  # 12 and the slack
    assert sum(len(h) for layer in log[15][0] for h in layer) == 12 * LAYERS * 2


def test_windows_take_no_part_in_sharing():
    policy = TrimKV(random_gates(4), 8, slack=0, allocation="global")
    model = kvcache.wrap(build("gemma3"), policy, page_size=4)
    log = run(model, tokens(), PROMPT).log
    for n in range(PROMPT, TOTAL + 1):
        counts = [[len(h) for h in layer] for layer in log[n][0]]
        assert counts[0] == counts[2] == [8, 8]
        assert sum(counts[1]) + sum(counts[3]) == 4 * 8
    kvcache.unwrap(model)
    result = run(kvcache.wrap(model, policy), tokens(), PROMPT)
    kvcache.unwrap(model)
    assert (result.logits[0] - dense_logits(model, tokens(), Replay(own_log(result)))).abs().max() < 5e-5


def test_requests_of_a_batch_are_as_alone_and_within_their_pages():
    policy = policy_for(allocation="global", slack=3)
    model = kvcache.wrap(build("llama-gqa"), policy, page_size=4, max_tokens=150)
    prompts = [tokens(seed=6 + i)[0, :n].tolist() for i, n in enumerate((40, 9, 23, 31))]
    options = {"max_new_tokens": 12, "do_sample": False}
    found = list(model.generate_batch(prompts, **options).values())
    for ids, output in zip(prompts, found):
        alone = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
        assert output.generated_tokens == alone[0, len(ids) :].tolist()


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["slack", "global-slack"])
def test_a_cache_is_copied_saved_and_goes_on(case):
    model = kvcache.wrap(build("llama-gqa"), policy_for(**CASES[case]), page_size=4)
    cache = run(model, tokens()[:, :50], PROMPT).cache
    saved = pickle.loads(pickle.dumps(cache.export_state()))
    twins = [copy.deepcopy(cache), cache.fork(), kvcache.KVCache.import_state(model, saved)]
    with torch.no_grad():
        for t in range(50, TOTAL):
            expected = model(tokens()[:, t : t + 1], past_key_values=cache).logits
            for twin in twins:
                assert torch.equal(model(tokens()[:, t : t + 1], past_key_values=twin).logits, expected)
                assert kept(twin) == kept(cache)


def test_a_wrapped_model_is_pickled_and_unwrapped():
    model = kvcache.wrap(build("llama-gqa"), policy_for())
    expected = greedy(model, tokens()[:, :30], None, 8).sequences
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(greedy(again, tokens()[:, :30], None, 8).sequences, expected)
    kvcache.unwrap(again)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())


def test_one_model_serves_caches_with_and_without_gates():
    model = kvcache.wrap(build("llama-gqa"), "full")
    plain = run(model, tokens(), PROMPT).logits
    gated = run(model, tokens(), PROMPT, cache=kvcache.KVCache(model, policy_for()))
    assert set(gated.cache.kept(0).flatten().tolist()) == {10}
    assert torch.equal(run(model, tokens(), PROMPT).logits, plain)
    assert all(layer.hidden is None for layer in gated.cache.engine.layers)


def test_a_failed_forward_leaves_no_hidden_states(monkeypatch):
    model = kvcache.wrap(build("llama-gqa"), policy_for())
    cache = run(model, tokens()[:, :50], PROMPT).cache
    before = kept(cache)

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(cache.engine, "append", fail)
    with pytest.raises(RuntimeError, match="boom"), torch.no_grad():
        model(tokens()[:, 50:51], past_key_values=cache)
    assert all(layer.hidden is None for layer in cache.engine.layers)
    assert kept(cache) == before


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TrimKV("nowhere.safetensors"), ValueError, "no file nowhere.safetensors; kvcache train-gates"),
        (lambda: TrimKV(3), TypeError, "gates must be the path.*3"),
        (lambda: TrimKV(keep=0), ValueError, "keep must be at least 1"),
        (lambda: TrimKV(slack=-1), ValueError, "slack must be at least 0"),
        (lambda: TrimKV(allocation="layer"), ValueError, "allocation must be one of.*'layer'"),
        (lambda: TrimKV(floor=1.5), ValueError, "floor must be a share.*1.5"),
        (lambda: TrimKV(floor=True), ValueError, "floor must be a share.*True"),
        (lambda: kvcache.parse_policy("trimkv(gates='x')"), ValueError, "no file x"),
        (lambda: TrimKV() | kvcache.H2O(), ValueError, "cannot combine trimkv.*retention"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TrimKV, "gates must name a file of gates"),
        (lambda: TrimKV(random_gates(5)), "gates are for layers 0-4, the model caches in 0-2"),
        (lambda: TrimKV(random_gates(3, heads=4)), "the gate of layer 0 is for 4 kv heads, a layer of the model has 2"),
        (lambda: TrimKV(random_gates(3, hidden=32)), "takes hidden states of 32, the model has 64"),
        (lambda: TrimKV(random_gates(5)) | kvcache.SkipDecode(1, 2), "gates are for layers 0-4"),
    ],
)
def test_gates_of_another_model_are_refused_at_wrap(make, message):
    model = build("llama-gqa")
    with pytest.raises(ValueError, match=message):
        kvcache.wrap(model, make())
    assert "_kvcache_state" not in model.__dict__
    assert not any(m._forward_pre_hooks for m in model.modules())
    kvcache.wrap(model, "full")
    with pytest.raises(ValueError, match=message):
        kvcache.KVCache(model, make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("deepseek-v3"), "layer 0 of DeepseekV3ForCausalLM makes keys of what is cached"),
        (lambda: tiny_model(BloomForCausalLM, "bloom"), "layer 0 of BloomForCausalLM computes attention itself"),
    ],
)
def test_models_whose_attention_shows_no_hidden_states(make, message):
    with pytest.raises(ValueError, match=f"needs the hidden states that enter attention, but {message}"):
        kvcache.wrap(make(), TrimKV(random_gates(3)))


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_text_form_names_the_file(tmp_path):
    policy = policy_for(keep=0.25, recent=3, allocation="global")
    again = kvcache.parse_policy(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)
    assert policy.gates in str(policy)
    assert str(kvcache.parse_policy("trimkv")) == "trimkv(gates=None, keep=1024, slack=128)"
    Gates.load(policy.gates).save(tmp_path)  # a folder
    assert Gates.load(tmp_path).shapes == {0: (64, 2), 1: (64, 2), 2: (64, 2)}
    model = build("llama-gqa")
    by_file = run(kvcache.wrap(model, policy), tokens(), PROMPT).log
    by_folder = TrimKV(tmp_path, 0.25, slack=0, recent=3, allocation="global")
    assert run(kvcache.wrap(model, by_folder), tokens(), PROMPT).log == by_file
    by_object = TrimKV(Gates.load(policy.gates), 0.25, slack=0, recent=3, allocation="global")
    assert str(by_object) == str(policy)
    assert str(TrimKV(gates_of_one_channel())) == "trimkv(gates='<gates in memory>', keep=1024, slack=128)"
    assert run(kvcache.wrap(model, by_object), tokens(), PROMPT).log == by_file


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="text is no safetensors file"):
        Gates.load(tmp_path / "text")
    save_file({"layers.0.mlp.weight": torch.zeros(2, 2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="holds layers.0.mlp.weight, which is no part of a gate"):
        Gates.load(tmp_path / "weights")
    tensors = load_file(random_gates(2))
    del tensors["layers.1.outer.bias"]
    save_file(tensors, tmp_path / "part")
    with pytest.raises(ValueError, match="part is incomplete.*layers.1.outer.bias"):
        Gates.load(tmp_path / "part")
    with pytest.raises(ValueError, match="shapes is empty"):
        Gates({})


def test_saved_gates_are_the_same_and_say_what_they_are(tmp_path):
    gates = Gates({1: (6, 2), 3: (5, 4)}, width=7, bias=2.5, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        Gates({0: (6, 2)})
        assert torch.equal(torch.rand(1), expected), "making gates moved the generator that sampling draws from"
    file = gates.save(tmp_path / "deep" / "g.safetensors", capacity=48, model="Nobody")
    again = Gates.load(file)
    assert again.shapes == gates.shapes == {1: (6, 2), 3: (5, 4)}
    assert again.metadata == {"capacity": "48", "model": "Nobody"}
    hidden = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.log_beta(3, hidden), gates.log_beta(3, hidden))
    assert again.log_beta(3, hidden).shape == (2, 4, 9)
    assert torch.allclose(again.log_beta(3, hidden).exp(), torch.tensor(2.5).sigmoid())  # W2 begins with 0
    assert not any(p.requires_grad for p in again.parameters())
    assert [p.name for p in file.parent.iterdir()] == ["g.safetensors"]
