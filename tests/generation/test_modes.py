"""Every mode of ``generate()`` under every kind of policy: each cell is right, or a documented error."""

import copy
import functools
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gates import random_gates
from support.models import build, continued, greedy, padded, prompt
from support.policies import filters_of
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

import kvcache
from kvcache.store import PageStorage

SKIP = kvcache.SkipDecode(min_layers=1, max_layers=2, horizon=60)
POLICIES = {
    "full": kvcache.Full(),
    "streamingllm": kvcache.StreamingLLM(sinks=2, window=9),
    "h2o": kvcache.H2O(5, 4),
    "tokenselect": kvcache.TokenSelect(k=8, sinks=2, local=6, reuse=0.4, chunk=5),
    "quest": kvcache.Quest(12, 1),
    "skipdecode": SKIP,
    "random": kvcache.RandomEviction(9, sinks=1, recent=2, seed=3),
    "h2o|skipdecode": kvcache.H2O(5, 4) | SKIP,
    "keydiff": kvcache.KeyDiff(9, sinks=1, recent=3),
    "keydiff-slack": kvcache.KeyDiff(9, sinks=1, recent=3, slack=4),
    "lagkv": kvcache.LagKV(11, sinks=1, lag=3),
    "expectedattention": kvcache.ExpectedAttention(9, horizon=20, sinks=1, recent=2),
    "duoattention": kvcache.DuoAttention(((True, False), (False, False)), sinks=2, recent=7),
    "tova": kvcache.TOVA(9),
    "snapkv": kvcache.SnapKV(9, 4, 3),
    "criticalkv": kvcache.CriticalKV(9, 4, 3),
    "qfilters": kvcache.QFilters(filters_of(2, 2), 9, recent=2),
    "rkv": kvcache.RKV(9, window=3, lam=0.4, buffer=3, pool=3),
    "adakv": kvcache.AdaKV(9, 4, 3, generated="evict"),
    "promptdistill": kvcache.PromptDistill(0, 9, truncate=1),
    "gemfilter": kvcache.GemFilter(0, 9),
    "trimkv": kvcache.TrimKV(random_gates(2), 9, slack=0, sinks=1, recent=3),
    "trimkv-global": kvcache.TrimKV(random_gates(2), 9, slack=2, recent=2, allocation="global"),
    "emasink": kvcache.EMASink(sinks=3, window=8, alpha=0.7),
    "cam": kvcache.CaM(5, 4, 4),
    "d2o": kvcache.D2O(5, 4),
    "kvmerger": kvcache.KVMerger(5, 4),
    "h2o|cache": kvcache.H2O(5, 4) | kvcache.CachePositions(),
}
ROOMY = {  # the same kinds with room for everything: even what reads differently in drafts is then exact
    "full": kvcache.Full(),
    "streamingllm": kvcache.StreamingLLM(sinks=2, window=200),
    "h2o": kvcache.H2O(100, 100),
    "tokenselect": kvcache.TokenSelect(k=100, chunk=5),
    "quest": kvcache.Quest(200),
    "skipdecode": kvcache.SkipDecode(2, 2),
    "random": kvcache.RandomEviction(200),
    "h2o|skipdecode": kvcache.H2O(100, 100) | kvcache.SkipDecode(2, 2),
    "keydiff": kvcache.KeyDiff(200),
    "keydiff-slack": kvcache.KeyDiff(200, slack=4),
    "lagkv": kvcache.LagKV(200, lag=3),
    "expectedattention": kvcache.ExpectedAttention(200),
    "duoattention": kvcache.DuoAttention(((True, True), (True, False)), sinks=2, recent=200),
    "tova": kvcache.TOVA(200),
    "snapkv": kvcache.SnapKV(200, 4, 3),
    "criticalkv": kvcache.CriticalKV(200, 4, 3),
    "qfilters": kvcache.QFilters(filters_of(2, 2), 200),
    "rkv": kvcache.RKV(200),
    "adakv": kvcache.AdaKV(200, 4, 3, generated="evict"),
    "promptdistill": kvcache.PromptDistill(0, 200, truncate=1),
    "gemfilter": kvcache.GemFilter(0, 200),
    "trimkv": kvcache.TrimKV(random_gates(2), 200),
    "trimkv-global": kvcache.TrimKV(random_gates(2), 200, allocation="global"),
    "emasink": kvcache.EMASink(sinks=3, window=200),
    "cam": kvcache.CaM(100, 100),
    "d2o": kvcache.D2O(100, 100),
    "kvmerger": kvcache.KVMerger(100, 100),
    "h2o|cache": kvcache.H2O(100, 100) | kvcache.CachePositions(),
}
BUDGETS = dict.fromkeys(("h2o", "random", "h2o|skipdecode", "keydiff", "expectedattention", "tova", "trimkv"), 9)
BUDGETS |= dict.fromkeys(("cam", "d2o", "kvmerger", "h2o|cache"), 9)
BUDGETS["streamingllm"] = BUDGETS["emasink"] = 11
NEW = 12
IDS, MASK = padded([prompt(n, seed=20 + n)[0] for n in (30, 21)], "left")


def plain():
    return build(num_hidden_layers=2)


@functools.cache
def unwrapped():
    """What the model without kvcache says: greedy tokens [2, NEW]."""
    return continued(plain(), IDS, MASK, NEW)


@functools.cache
def alone(name):
    """The policy's own greedy tokens [2, NEW], by a loop of forwards: no mode of ``generate`` is in it."""
    model = kvcache.wrap(plain(), POLICIES[name], page_size=4)
    tokens = torch.cat([step.argmax(-1, keepdim=True) for step in read(model, kvcache.KVCache(model), IDS, MASK)], 1)
    assert (name == "full") == torch.equal(tokens, unwrapped())  # tight policies do decide something
    return tokens


@torch.no_grad()
def read(model, cache, ids, mask, new=NEW, forced=None):
    """Logits [rows, vocabulary] after ``ids`` and after each greedy (or ``forced``) token, ``new`` in all."""
    out = []
    for n in range(new):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        last = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
        out.append(last)
        ids = last.argmax(-1, keepdim=True) if forced is None else forced[:, n : n + 1]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return out


def within_budget(name, cache):
    if name in BUDGETS:
        for layer in range(2):
            assert (cache.kept(layer) <= BUDGETS[name]).all()
        assert (cache.kept(0) == BUDGETS[name]).all()  # and not less: the layer that always runs is full


@pytest.fixture(params=POLICIES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return kvcache.wrap(plain(), POLICIES[name], page_size=4)


@pytest.fixture(autouse=True)
def no_page_is_leaked(monkeypatch):
    """Every pool that a test made is empty once the test's caches are gone."""
    pools, make = [], PageStorage.__init__

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        pools.append(self.pool)

    monkeypatch.setattr(PageStorage, "__init__", remember)
    yield
    if any(pool.used for pool in pools):
        gc.collect()  # an exception's traceback may hold a cache a little longer
    assert not any(pool.used for pool in pools)


def test_greedy(name, model):
    out = greedy(model, IDS, MASK, NEW)
    assert torch.equal(out.sequences[:, -NEW:], alone(name))
    assert out.past_key_values.seen_tokens == 30 + NEW - 1
    within_budget(name, out.past_key_values)


def test_sampling_of_several_sequences_and_their_scores(name, model):
    """The scores of every sample are those of its tokens read alone."""
    torch.manual_seed(5)
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True, top_k=0, num_return_sequences=3,
        output_scores=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[:, 30:]
    assert len({tuple(t) for t in tokens.tolist()}) == 6
    within_budget(name, out.past_key_values)
    found = torch.stack(out.logits, 1)
    assert torch.equal(found, torch.stack(out.scores, 1))
    for sample in range(3):
        rows = slice(sample, None, 3)
        expected = torch.stack(read(model, kvcache.KVCache(model), IDS, MASK, forced=tokens[rows]), 1)
        assert (found[rows] - expected).abs().max() < 1e-4
    one = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(one[:, 30:], alone(name).repeat_interleave(2, 0))


def test_beam_search(name, model):
    """Free beams equal the unwrapped model under a policy with room; beams led to the greedy path are greedy."""
    tokens = torch.cat([IDS, alone(name)], 1)
    next_ = {tuple(row[:n].tolist()): int(row[n]) for row in tokens for n in range(30, tokens.shape[1])}

    def follow(row, prefix):
        found = next_.get(tuple(prefix.tolist()))
        return list(range(97)) if found is None else [found]

    out = greedy(model, IDS, MASK, NEW, num_beams=3, prefix_allowed_tokens_fn=follow)
    assert torch.equal(out.sequences, tokens)
    within_budget(name, out.past_key_values)
    expected = continued(kvcache.unwrap(model), IDS, MASK, NEW, num_beams=3)
    assert not torch.equal(expected, unwrapped())
    assert torch.equal(continued(kvcache.wrap(model, ROOMY[name]), IDS, MASK, NEW, num_beams=3), expected)


@pytest.mark.parametrize("mode", ["prompt lookup", "good assistant", "bad assistant"])
def test_speculation(name, model, mode):
    """Exact where there is room (or all is kept); a tight policy's drafts read what would have been evicted between
    them, so there it is held to its budget, to what was accepted, and to repeating itself."""
    ids = torch.cat([prompt(12, seed=3), prompt(5, seed=4), prompt(12, seed=3)], 1)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "good assistant": {"assistant_model": plain()},
        "bad assistant": {"assistant_model": build(seed=5, num_hidden_layers=2)},
    }[mode]
    out = greedy(model, ids, None, NEW, **options)
    cache = out.past_key_values
    cache.crop(0)
    # An accepted draft's last token may or may not have been read.
    assert cache.seen_tokens in (29 + NEW - 1, 29 + NEW)
    assert not any(layer.pending for layer in cache.engine.layers)
    within_budget(name, cache)
    assert torch.equal(greedy(model, ids, None, NEW, **options).sequences, out.sequences)
    if name in ("full", "skipdecode", "gemfilter"):
        assert torch.equal(continued(model, ids, None, NEW), out.sequences[:, 29:])
    expected = continued(kvcache.unwrap(model), ids, None, NEW)
    assert torch.equal(continued(kvcache.wrap(model, ROOMY[name]), ids, None, NEW, **options), expected)


@pytest.mark.parametrize("size", [5, 50])
def test_chunked_prefill(name, model, size):
    # TokenSelect's own chunks start at real tokens: in a padded batch they are cut elsewhere than the prompt's.
    ids, mask = (IDS[:1], MASK[:1]) if name == "tokenselect" else (IDS, MASK)
    if POLICIES[name].routes and size < 30:  # a documented error
        with pytest.raises(ValueError, match=f"needs the prompt at once.* got {size} of the 30 columns"):
            greedy(model, ids, mask, NEW, prefill_chunk_size=size)
        return
    out = greedy(model, ids, mask, NEW, prefill_chunk_size=size)
    assert torch.equal(out.sequences[:, 30:], alone(name)[: len(ids)])
    within_budget(name, out.past_key_values)


def test_chat_continuation(name, model):
    """Two turns through ``generate`` and one cache against the same forwards by hand."""
    cache, by_hand = kvcache.KVCache(model), kvcache.KVCache(model)
    first = greedy(model, IDS, MASK, 6, past_key_values=cache).sequences
    ids = torch.cat([first, prompt(7, seed=9, rows=2)], 1)
    mask = torch.nn.functional.pad(MASK, (0, 13), value=1)
    out = greedy(model, ids, mask, NEW, past_key_values=cache)
    assert out.past_key_values is cache
    within_budget(name, cache)
    read(model, by_hand, IDS, MASK, 6)
    expected = read(model, by_hand, ids[:, by_hand.seen_tokens :], mask)
    assert torch.equal(out.sequences[:, -NEW:], torch.stack(expected, 1).argmax(-1))
    if name == "full":
        assert torch.equal(continued(kvcache.unwrap(model), ids, mask, NEW), out.sequences[:, -NEW:])


def test_forks_reuse_a_prefix(name, model):
    system = kvcache.KVCache(model)
    read(model, system, IDS, MASK, 1)
    held = [system.positions(x, r, 0).tolist() for x in range(2) for r in range(2)]
    for seed in (1, 2):
        ids = torch.cat([IDS, prompt(5, seed=seed, rows=2)], 1)
        mask = torch.nn.functional.pad(MASK, (0, 5), value=1)
        fresh = kvcache.KVCache(model)
        read(model, fresh, IDS, MASK, 1)
        expected = torch.stack(read(model, fresh, ids[:, 30:], mask), 1).argmax(-1)
        fork = system.fork()
        assert torch.equal(continued(model, ids, mask, NEW, past_key_values=fork), expected)
        within_budget(name, fork)
    assert held == [system.positions(x, r, 0).tolist() for x in range(2) for r in range(2)]


class Collector:
    """What ``generate`` needs of a streamer."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, tokens):
        self.pieces.append(tokens.flatten().tolist())

    def end(self):
        self.ended = True


def test_streaming(name, model):
    streamer = Collector()
    greedy(model, IDS[:1], MASK[:1], NEW, streamer=streamer)
    assert streamer.ended
    assert streamer.pieces == [IDS[0].tolist(), *([t] for t in alone(name)[0].tolist())]


class StopAt(StoppingCriteria):
    def __init__(self, columns):
        self.columns = columns

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


def test_stopping_criteria(name, model):
    out = greedy(model, IDS, MASK, NEW, stopping_criteria=StoppingCriteriaList([StopAt(35)]))
    assert torch.equal(out.sequences[:, 30:], alone(name)[:, :5])
    assert out.past_key_values.seen_tokens == 34
    token = int(alone(name)[0, 3])
    length = alone(name)[0].tolist().index(token) + 1
    out = greedy(model, IDS[:1], MASK[:1], NEW, eos_token_id=token)
    assert torch.equal(out.sequences[0, 30:], alone(name)[0, :length])


def test_output_scores(name, model):
    out = greedy(model, IDS, MASK, NEW, output_scores=True)
    expected = read(model, kvcache.KVCache(model), IDS, MASK)
    assert (torch.stack(out.scores) - torch.stack(expected)).abs().max() < 1e-4


def test_output_attentions_is_a_documented_error(name, model):
    with pytest.raises(ValueError, match="output_attentions=True is not possible"):
        greedy(model, IDS, MASK, NEW, output_attentions=True)
    assert torch.equal(continued(model, IDS, MASK, NEW), alone(name))


def test_without_a_cache(name, model):
    out = greedy(model, IDS, MASK, NEW, use_cache=False)
    assert out.past_key_values is None
    assert torch.equal(out.sequences[:, 30:], unwrapped())


def test_input_embeddings(name, model):
    embeddings = model.get_input_embeddings()(IDS).detach()
    out = model.generate(inputs_embeds=embeddings, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, alone(name))


def test_deep_copies(name, model):
    """Of the model, then of a cache in the middle of a sequence."""
    twin = copy.deepcopy(model)
    kvcache.unwrap(model)
    assert torch.equal(continued(twin, IDS, MASK, NEW), alone(name))
    assert type(greedy(model, IDS, MASK, 2).past_key_values) is DynamicCache
    cache = kvcache.KVCache(twin)
    start, rest = alone(name)[:, :4], alone(name)[:, 4:]
    read(twin, cache, IDS, MASK, 5, start)  # the prompt and all of start
    for c in (copy.deepcopy(cache), cache):
        mask = torch.nn.functional.pad(MASK, (0, 5), value=1)
        found = read(twin, c, rest[:, :1], mask, NEW - 5)
        assert torch.equal(torch.stack(found, 1).argmax(-1), rest[:, 1:])


def test_save_and_reload(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(continued(again, IDS, MASK, NEW), unwrapped())
    kvcache.wrap(again, str(POLICIES[name]), page_size=4)
    assert torch.equal(continued(again, IDS, MASK, NEW), alone(name))


def test_a_pickled_state_continues(name, model):
    cache = kvcache.KVCache(model)
    read(model, cache, IDS, MASK, 5, alone(name)[:, :4])
    state = pickle.loads(pickle.dumps(cache.export_state()))
    again = kvcache.KVCache.import_state(model, state)
    mask = torch.nn.functional.pad(MASK, (0, 5), value=1)
    found = read(model, again, alone(name)[:, 4:5], mask, NEW - 5)
    assert torch.equal(torch.stack(found, 1).argmax(-1), alone(name)[:, 5:])
    within_budget(name, again)


@pytest.fixture(scope="module")
def compiled():
    """A wrapped model with a compiled forward, one for all policies, and the graphs that dynamo cut out of it."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = kvcache.wrap(plain(), "full", page_size=4)
    model.forward = torch.compile(model.forward, backend=backend)
    yield model, graphs
    torch._dynamo.reset()


def test_torch_compile_of_the_forward(name, compiled):
    """Dynamo compiles what lies between the calls of the cache, which stay Python; the tokens are the same."""
    model, graphs = compiled
    cache = kvcache.KVCache(model, POLICIES[name])
    assert torch.equal(continued(model, IDS, MASK, NEW, past_key_values=cache), alone(name))
    within_budget(name, cache)
    multiplied = {n.target for g in graphs for n in g.graph.nodes if n.op == "call_function"}
    assert torch._C._nn.linear in multiplied


def test_gradients_of_training(name):
    def gradients(model):
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = plain().train()
    expected = gradients(model)
    found = gradients(kvcache.wrap(model, POLICIES[name], page_size=4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(bool(g.abs().max() > 1e-3) for g in expected)
    assert torch.equal(continued(model.eval(), IDS, MASK, NEW), alone(name))


def test_four_threads_generate_with_one_model(name, model):
    prompts = [prompt(18 + 4 * i, seed=40 + i) for i in range(4)]
    expected = [continued(model, ids, None, NEW) for ids in prompts]
    start = threading.Barrier(4)

    def work(ids):
        start.wait()
        return [continued(model, ids, None, NEW) for _ in range(2)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, prompts))
    assert all(torch.equal(a, b) for pair, b in zip(found, expected, strict=True) for a in pair)


def test_two_models_that_share_a_config(name):
    """Each follows its own policy, in turns; unwrapping one leaves the other wrapped."""
    first, second = plain(), build(seed=5, num_hidden_layers=2)
    expected = unwrapped(), continued(second, IDS, MASK, NEW)
    second.config = first.config
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    kvcache.wrap(first, POLICIES[name], page_size=4)
    kvcache.wrap(second, ROOMY[name], page_size=4)
    for _ in range(2):
        assert torch.equal(continued(first, IDS, MASK, NEW), alone(name))
        assert torch.equal(continued(second, IDS, MASK, NEW), expected[1])
    kvcache.unwrap(first)
    assert torch.equal(continued(first, IDS, MASK, NEW), expected[0])
    assert torch.equal(continued(second, IDS, MASK, NEW), expected[1])


@pytest.mark.parametrize("call", [0, 3])  # in the prompt, and in a step
def test_after_an_exception_inside_a_forward_the_next_call_is_right(name, model, call):
    calls = iter(range(10**6))

    def explode(module, args, output):
        if next(calls) == call:
            raise KeyError("in the middle")

    handle = model.model.layers[1 if name != "skipdecode" else 0].self_attn.register_forward_hook(explode)
    cache = kvcache.KVCache(model)
    with pytest.raises(KeyError, match="in the middle"):
        continued(model, IDS, MASK, NEW, past_key_values=cache)
    handle.remove()
    assert torch.equal(continued(model, IDS, MASK, NEW), alone(name))
    # The cache that was interrupted goes on where it was: every token that it counted is there, no other is.
    seen = cache.seen_tokens
    assert seen == (0 if call == 0 else 30 + call - 1)
    ids = torch.cat([IDS, alone(name)], 1)
    mask = torch.nn.functional.pad(MASK, (0, NEW), value=1)
    first = (IDS, MASK) if call == 0 else (ids[:, seen : seen + 1], mask[:, : seen + 1])
    done = max(seen - 29, 0)
    found = read(model, cache, *first, NEW - done)
    assert torch.equal(torch.stack(found, 1).argmax(-1), alone(name)[:, done:])
    within_budget(name, cache)


def test_a_pickled_model_is_wrapped(name, model):
    again = pickle.loads(pickle.dumps(model))
    kvcache.unwrap(model)
    assert torch.equal(continued(again, IDS, MASK, NEW), alone(name))
    assert torch.equal(continued(kvcache.unwrap(again), IDS, MASK, NEW), unwrapped())


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
    ],
    ids=["contrastive", "group beams", "dola"],
)
def test_modes_that_left_transformers_are_its_own_error(name, model, options):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        greedy(model, IDS, MASK, NEW, **options)
    assert torch.equal(continued(model, IDS, MASK, NEW), alone(name))
