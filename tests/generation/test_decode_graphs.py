"""One CUDA graph per decode step, replayed inside unmodified generate(): right while lengths, pages and budgets change.

Without a GPU, captures are those of support/pretend_gpu.py: a capture records the ops and runs nothing, a replay runs
them on the same memory, and whatever CUDA refuses while capturing is refused.
"""

import copy
import pickle

import pytest
import torch
from support.models import ARCHITECTURES, WINDOW, build, greedy, padded, prompt
from support.policies import LAYERS, POLICIES, usual
from support.pretend_gpu import GPU, PretendTensor, move, on_gpu, pretend_gpu

import kvcache

ROWS = [prompt(n, seed=20 + n)[0] for n in (30, 19, 25)]
#: Policies whose steps need no word from the device.
CAPTURED = (
    "full",
    "streamingllm",
    "h2o",
    "random",
    "skipdecode",
    "tokenselect",
    "tokenselect-shortlist",
    "skipdecode|tokenselect",
    "quest",
    "quest|skipdecode",
    "knorm",
    "knorm|skipdecode",
    "qfilters",
    "keydiff-slack",
    "keydiff|skipdecode",
    "duoattention",
    "lagkv",
    "expectedattention-slack",
    "tova",
    "snapkv",
    "snapkv-evict",
    "snapkv|skipdecode",
    "pyramidkv",
    "criticalkv|skipdecode",
    "adakv-evict",
    "trimkv",
    "trimkv-global",
    "trimkv|skipdecode",
)


@pytest.fixture(params=[pytest.param("pretended", marks=pytest.mark.cpu), pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request):
    """Moves models and tensors to a GPU, pretended or real."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and kvcache._C.cuda_info()["compiled"]):
            pytest.skip("no GPU, or kvcache built without nvcc")
        yield lambda x: x.cuda()
        return
    with torch.no_grad(), pretend_gpu():
        yield lambda x: move(x) if isinstance(x, torch.nn.Module) else on_gpu(x)


def host(x):
    return x.inner if isinstance(x, PretendTensor) else x.cpu()


def both(gpu, policy, ids, mask=None, new=24, name=None, changes=None, **kwargs):
    """(tokens on the CPU, the output on the GPU)."""
    models = []
    for place in (lambda model: model, gpu):
        model = build(name or usual(policy), **(changes or {}))
        model.set_experts_implementation("eager")
        models.append(kvcache.wrap(place(model), policy))
    here = greedy(models[0], ids, mask, new, **kwargs)
    return here, greedy(models[1], gpu(ids), gpu(torch.ones_like(ids) if mask is None else mask), new, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", CAPTURED)
def test_the_same_tokens_by_replays(gpu, policy, side):
    here, there = both(gpu, POLICIES[policy], *padded(ROWS, side), changes={"num_hidden_layers": LAYERS})
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    assert graphs.refused is None
    assert graphs.replays >= 6, graphs
    assert f"{graphs.replays} replays" in str(there.past_key_values.report())
    for layer in range(LAYERS):
        assert torch.equal(here.past_key_values.kept(layer), there.past_key_values.kept(layer))
        mine, theirs = (x.past_key_values.engine.layers[layer] for x in (here, there))
        assert mine.counters == theirs.counters
        if mine.store is not None and mine.engine.policy.needs:
            n = mine.store.max_count
            scores = mine.store.columns[0][..., :n], host(theirs.store.columns)[0][..., :n]
            live = torch.arange(n) < mine.store.counts[..., None]
            torch.testing.assert_close(*(torch.where(live, x, 0.0) for x in scores), rtol=1e-4, atol=1e-5)


def test_a_policy_that_observes_every_query_decodes_without_a_graph(gpu):
    here, there = both(gpu, POLICIES["rkv"], prompt(30, rows=2), new=12)
    assert torch.equal(here.sequences, host(there.sequences))
    assert there.past_key_values.graphs.captures == there.past_key_values.graphs.replays == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(gpu, name):
    here, there = both(gpu, POLICIES["h2o"], prompt(WINDOW + 3, rows=2), name=name, new=16)
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    if graphs.refused is None:
        assert graphs.replays >= 8
    else:  # experts of a mixture are chosen on the host, as these models are built here
        assert "cannot be captured" in graphs.refused
        assert any(part in name for part in ("moe", "oss", "deepseek")), graphs.refused


def test_growing_needs_few_captures(gpu):
    here, there = both(gpu, "full", prompt(5, rows=2), new=100)
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    assert graphs.captures <= 8  # memory doubles
    assert graphs.replays >= 99 - 2 * graphs.captures
    assert len(graphs.captured) == 1  # the others would hold on to memory that is of no more use


def test_one_graph_per_set_of_layers(gpu):
    policy = f"skipdecode(min_layers=2, max_layers={LAYERS}, horizon=60)"
    changes = {"num_hidden_layers": LAYERS}
    here, there = both(gpu, policy, prompt(30), new=40, changes=changes)
    assert torch.equal(here.sequences, host(there.sequences))
    assert there.past_key_values.graphs.replays > 20


def test_a_selection_that_begins_while_decoding(gpu):
    """The host stops reading everything: the graph of before would go on with it."""
    policy = POLICIES["tokenselect"]
    here, there = both(gpu, policy, prompt(policy.sinks + policy.k + policy.local - 8, rows=2), new=40)
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    assert graphs.captures >= 2
    assert graphs.replays > 20
    counters = here.past_key_values.engine.layers[0].counters
    assert counters["selections"] > 0
    assert counters == there.past_key_values.engine.layers[0].counters


def test_a_kept_cache_goes_on(gpu):
    """A chat: replays, another prompt, a fork whose shared pages forbid replays, and replays again."""
    tokens = []
    for place in (lambda x: x, gpu):
        model = kvcache.wrap(place(build()), POLICIES["h2o"])
        cache = kvcache.KVCache(model)
        ids, said = prompt(30), []
        for turn in range(3):
            out = greedy(model, place(ids), place(torch.ones_like(ids)), 8, past_key_values=cache)
            ids = torch.cat([host(out.sequences), prompt(4, seed=turn)], 1)
            said.append(ids)
            if turn == 1:
                twin = cache.fork()
                again = greedy(model, place(ids), place(torch.ones_like(ids)), 5, past_key_values=twin)
                said.append(host(again.sequences))
        tokens.append(said)
        if place is gpu:
            assert cache.graphs.replays > 8
    assert all(torch.equal(a, b) for a, b in zip(*tokens, strict=True))


@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_beams(gpu, policy):
    here, there = both(gpu, POLICIES[policy], prompt(20, rows=2), num_beams=3)
    assert torch.equal(here.sequences, host(there.sequences))


def test_what_cannot_be_captured_runs_as_it_is(gpu, caplog):
    with caplog.at_level("INFO", logger="kvcache"):
        here, there = both(gpu, "full", prompt(20), name="qwen3-moe")  # experts are chosen on the host
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    assert "cannot be captured" in graphs.refused
    assert "Qwen3MoeForCausalLM decodes without a CUDA graph" in caplog.text
    assert str(there.past_key_values.report()).endswith(f"decode eager: {graphs.refused}")
    assert torch.equal(here.past_key_values.kept(0), there.past_key_values.kept(0))


def test_a_score_over_all_keys_is_not_captured_but_right(gpu):
    """KeyDiff without slack evicts at every step, and reads all keys for it."""
    here, there = both(gpu, POLICIES["keydiff"], *padded(ROWS, "left"), changes={"num_hidden_layers": LAYERS})
    assert torch.equal(here.sequences, host(there.sequences))
    graphs = there.past_key_values.graphs
    assert graphs.replays == 0
    assert "densely" in graphs.refused
    for layer in range(LAYERS):
        assert torch.equal(here.past_key_values.kept(layer), there.past_key_values.kept(layer))


def test_hooks_inside_are_called_for_every_token(gpu):
    model = kvcache.wrap(gpu(build()), "full")
    ids, calls = prompt(20), []
    cache = kvcache.KVCache(model)
    out = greedy(model, gpu(ids), gpu(torch.ones_like(ids)), 8, past_key_values=cache)
    assert cache.graphs.replays > 3
    model.model.layers[1].register_forward_hook(lambda *a: calls.append(1))
    ids = host(out.sequences)
    greedy(model, gpu(ids), gpu(torch.ones_like(ids)), 6, past_key_values=cache)
    assert len(calls) == 6
    assert "hook" in cache.graphs.refused


def test_an_output_is_not_overwritten_by_the_next_step(gpu):
    model = kvcache.wrap(gpu(build()), "full")
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        model(gpu(prompt(12)), past_key_values=cache)
        outs = []
        for t in range(5):
            step = gpu(torch.tensor([[t + 3]]))
            place = gpu(torch.tensor([[12 + t]]))
            outs.append(model(step, position_ids=place, past_key_values=cache).logits)
        saved = [host(x).clone() for x in outs]
        model(gpu(torch.tensor([[9]])), position_ids=gpu(torch.tensor([[17]])), past_key_values=cache)
    assert cache.graphs.replays == 4
    assert all(torch.equal(host(a), b) for a, b in zip(outs, saved))
    assert not torch.equal(saved[3], saved[4])
    with torch.no_grad():  # places that the model counts on the host would be captured as they were
        plain, given = cache.fork(), cache.fork()
        for t in range(4):
            a = model(step, past_key_values=plain).logits
            b = model(step, position_ids=gpu(torch.tensor([[18 + t]])), past_key_values=given).logits
            torch.testing.assert_close(host(a), host(b))


def test_a_failed_forward_is_undone(gpu, monkeypatch):
    model = kvcache.wrap(gpu(build()), POLICIES["h2o"])
    ids = prompt(20)
    cache = kvcache.KVCache(model)
    out = greedy(model, gpu(ids), gpu(torch.ones_like(ids)), 6, past_key_values=cache)
    twin = cache.fork()
    lengths = [cache.kept(i).clone() for i in range(len(cache.layers))]
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda *a: 1 / 0
    step, place = gpu(host(out.sequences)[:, -1:]), gpu(torch.tensor([[cache.seen_tokens]]))
    with torch.no_grad():
        for _ in range(2):  # the first runs as it is, the second while it is captured
            with pytest.raises(ZeroDivisionError):
                model(step, position_ids=place, past_key_values=twin)
        del mlp.forward
        assert twin.seen_tokens == cache.seen_tokens
        assert all(torch.equal(twin.kept(i), n) for i, n in enumerate(lengths))
        for _ in range(4):
            place = gpu(torch.tensor([[cache.seen_tokens]]))
            a, b = (model(step, position_ids=place, past_key_values=c).logits for c in (cache, twin))
            torch.testing.assert_close(host(a), host(b))


def test_eager_and_unwrap(gpu):
    model = kvcache.wrap(gpu(build()), decode="eager")
    assert kvcache.KVCache(model).graphs is None
    assert "forward" not in model.__dict__
    kvcache.wrap(model)
    assert kvcache.KVCache(model).graphs is not None
    kvcache.unwrap(model)
    assert "forward" not in model.__dict__


def test_copies_of_a_model_have_their_own_forward():
    model = kvcache.wrap(build())
    with pretend_gpu():
        from kvcache.decode_graph import GraphedForward

        model.forward = GraphedForward(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.forward.model is twin
    kvcache.unwrap(model)
    assert "forward" not in model.__dict__


def test_the_pretended_capture_is_strict():
    """Otherwise the tests above would prove nothing."""
    with pretend_gpu():
        x, total = on_gpu(torch.arange(3.0)), on_gpu(torch.zeros(()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            total += y.sum()
        assert float(total) == 0
        for step in (1, 2):
            x.copy_(torch.full((3,), float(step)))
            graph.replay()
            assert host(y).tolist() == [2.0 * step] * 3
        assert float(total) == 18
        for refused in (lambda: float(total), lambda: x.cpu(), lambda: x.copy_(torch.ones(3)), lambda: x.nonzero(),
                        lambda: x[x > 0], lambda: torch.ones(3).to(GPU)):  # fmt: skip
            with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                refused()
