"""PromptDistill drops what its paper's rule says, costs nothing there, and is right under ``generate()``."""

from types import SimpleNamespace

import pytest
import torch
from support.models import build, continued, greedy, padded, prompt
from support.runs import kept
from transformers import BloomConfig, BloomForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvcache
from kvcache import layers
from kvcache.policies import PromptDistill

LAYERS, LENGTH = 5, 40


def model_of(policy=None, name="llama-gqa"):
    model = build(name, **({"n_layer": LAYERS} if name == "gpt2" else {"num_hidden_layers": LAYERS}))
    return model if policy is None else kvcache.wrap(model, policy, page_size=4)


def lengths(cache):
    """Entries of every head, by layer; all rows and heads of a layer hold as many."""
    return [set(cache.kept(i).flatten().tolist()) for i in range(LAYERS)]


# -- the rule -------------------------------------------------------------------------------------------------------


def ask(policy, x, rows=1, span=None):
    """What ``policy`` keeps of tokens whose logits are ``x``, -1 columns being padding: one head of one channel."""
    n = len(x)
    view = SimpleNamespace(
        index=policy.routes_after[0],
        group=1,
        all_heads=1,
        over_heads=lambda t: t,
        prompt_span=span or (torch.zeros(rows, dtype=torch.int32), torch.full((rows,), n, dtype=torch.int32)),
    )
    keys = torch.tensor(x).view(1, 1, n, 1)
    positions = torch.arange(n, dtype=torch.int32)[None]
    kept = policy.route(view, torch.ones(1, 1, n, 1), keys, positions)
    return kept[0].nonzero()[:, 0].tolist()


def test_the_worked_example():
    """Pooled scores 1.6, 3.6, 4.0, 3.4, 2.6, 2.4, 0.4: the peak at 3 is not kept (shared/reference/papers.md, §5)."""
    x = [3.0, 4.0, 1.0, 10.0, 2.0, 0.0, 0.0, 5.0]
    assert ask(PromptDistill(13, 2), x) == [1, 2, 7]
    assert ask(PromptDistill(13, 3), x) == [1, 2, 3, 7]
    assert ask(PromptDistill(13, 0.25), x) == [1, 2, 7]  # a share of 8 tokens
    assert ask(PromptDistill(13, 0.01), x) == [2, 7]  # at least one
    assert ask(PromptDistill(13, 2, pool=1), x) == [1, 3, 7]
    assert ask(PromptDistill(13, 7), x) == list(range(8))
    assert ask(PromptDistill(13, 2), [1.0] * 8) == [2, 3, 7]  # ties: the first ones


def test_drafts_behind_the_prompt_stay():
    x = [3.0, 4.0, 1.0, 10.0, 2.0, 0.0, 0.0, 5.0, 9.0, 9.0]
    span = (torch.zeros(1, dtype=torch.int32), torch.full((1,), 8, dtype=torch.int32))
    # The query is the one at 7: all queries are alike here, but what counts as 0 from 7 on shows it.
    assert ask(PromptDistill(13, 2), x, span=span) == [1, 2, 7, 8, 9]


@torch.no_grad()
def by_hand(model, ids, stages, pool, new):
    """Greedy tokens of a loop over the decoder layers, each on the tokens that the stages before it left, and the
    lengths of the layers' caches; nothing of kvcache is in it. ``stages``: layer -> tokens kept."""
    body, cache, out = model.model, DynamicCache(config=model.config), []
    queries = {}
    for i in stages:
        body.layers[i].self_attn.q_proj.register_forward_hook(lambda m, a, q, i=i: queries.__setitem__(i, q))
    places = torch.arange(ids.shape[1])[None]
    for _ in range(new):
        hidden = body.embed_tokens(ids)
        for i, layer in enumerate(body.layers):
            rotation = body.rotary_emb(hidden, position_ids=places)
            causal = (places[0][:, None] >= places[0])[None, None] if hidden.shape[1] > 1 else None
            hidden = layer(
                hidden, attention_mask=causal, position_embeddings=rotation, position_ids=places, cache=cache,
            )  # fmt: skip
            if i in stages and hidden.shape[1] > 1:
                q = queries[i].view(1, -1, 4, 16).transpose(1, 2)
                q, _ = apply_rotary_pos_emb(q, q, *rotation)
                listed = choose(q[0, :, -1], cache.layers[i].keys[0], stages[i], pool)
                hidden, places = hidden[:, listed], places[:, listed]
        token = model.lm_head(body.norm(hidden[:, -1:])).argmax(-1)
        out.append(token)
        places = places[:, -1:] + 1
        ids = token
    return torch.cat(out, 1), [x.keys.shape[2] for x in cache.layers]


def choose(query, keys, keep, pool):
    group, n = query.shape[0] // keys.shape[0], keys.shape[1]
    x = [float(sum(query[h] @ keys[h // group, j] for h in range(query.shape[0]))) for j in range(n - 1)]
    s = [sum(x[max(j - pool // 2, 0) : j + pool // 2 + 1]) for j in range(n - 1)]
    return sorted([*sorted(range(n - 1), key=lambda j: -s[j])[:keep], n - 1])


@pytest.mark.parametrize(
    ("name", "policy", "stages"),
    [
        ("llama-gqa", PromptDistill(2, 9), {2: 9}),
        ("llama-mqa", PromptDistill((0, 2), (20, 6), 3), {0: 20, 2: 6}),
        ("llama-mha", PromptDistill(2, 9), {2: 9}),
        ("llama-gqa", PromptDistill((1, 2, 3), (0.75, 0.5, 4)), {1: 30, 2: 20, 3: 4}),
    ],
)
def test_equals_a_loop_over_the_layers(name, policy, stages):
    ids, new = prompt(LENGTH), 11
    expected, sizes = by_hand(model_of(name=name), ids, stages, policy.pool, new)
    out = greedy(model_of(policy, name), ids, new=new)
    assert torch.equal(out.sequences[:, LENGTH:], expected)
    assert not torch.equal(continued(model_of(name=name), ids, new=new), expected)
    cache = out.past_key_values
    assert cache.get_seq_length() == LENGTH + 10  # tokens seen, also in layers that hold fewer
    held = [LENGTH] * LAYERS
    for r, k in stages.items():
        held[r + 1 :] = [k + 1] * (LAYERS - r - 1)
    assert sizes == [n + 10 for n in held]
    assert lengths(cache) == [{n} for n in sizes]


@pytest.mark.parametrize(
    ("truncate", "held"), [(0, (40, 40, 21, 21, 7)), (1, (21, 21, 21, 21, 7)), (-1, (21, 21, 7, 7, 7))]
)
def test_truncation_leaves_the_kept_sets(truncate, held):
    """Ten steps after the prompt a layer holds what its stage left and ten tokens; decode steps drop nothing."""
    policy = PromptDistill((1, 3), (20, 6), truncate=truncate)
    cache = greedy(model_of(policy), prompt(LENGTH), new=11).past_key_values
    assert lengths(cache) == [{n + 10} for n in held]
    whole = greedy(model_of(PromptDistill((1, 3), (20, 6))), prompt(LENGTH), new=1).past_key_values
    first, second = whole.positions(2, 0, 0).tolist(), whole.positions(4, 0, 0).tolist()
    sets = {40: list(range(LENGTH)), 21: first, 7: second}
    for i, n in enumerate(held):
        assert [cache.positions(i, 0, h).tolist()[:n] for h in range(2)] == [sets[n]] * 2
        assert cache.positions(i, 0, 0).tolist()[n:] == list(range(LENGTH, LENGTH + 10))


@pytest.mark.parametrize("policy", [PromptDistill(1, 39), PromptDistill(4, 1), PromptDistill(1, 1.0, truncate=-1)])
def test_room_for_the_prompt_and_the_last_layer_change_nothing(policy):
    ids = prompt(LENGTH)
    out = greedy(model_of(policy), ids, new=6)
    assert torch.equal(out.sequences, greedy(model_of(), ids, new=6).sequences)
    assert lengths(out.past_key_values) == [{LENGTH + 5}] * LAYERS


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """(layer, rows, tokens) of every run of a decoder layer."""
    found, run = [], layers.RoutedForward._run

    def spy(self, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append((self.index, *hidden.shape[:2]))
        return run(self, args, kwargs)

    monkeypatch.setattr(layers.RoutedForward, "_run", spy)
    return found


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt", "mistral", "qwen3-moe"])
def test_later_layers_are_given_what_is_left_alone(name, calls):
    model = model_of(PromptDistill((0, 2), (15, 6)), name)
    ids, mask = padded([prompt(LENGTH)[0], prompt(12, seed=2)[0]], "left")
    greedy(model, ids, mask, new=2)
    prompts = [c for c in calls if c[2] > 1]
    assert prompts == [(0, 2, 40), (1, 2, 16), (2, 2, 16), (3, 2, 7), (4, 2, 7)]
    assert calls[len(prompts) :] == [(i, 2, 1) for i in range(LAYERS)]


def test_inputs_that_cannot_be_cut_are_run_whole(calls, monkeypatch):
    policy = PromptDistill((0, 2), (15, 6))
    model = model_of(policy)
    ids, mask = padded([prompt(LENGTH)[0], prompt(12, seed=2)[0]], "left")
    expected = greedy(model, ids, mask, 6)
    calls.clear()
    monkeypatch.setattr(layers, "_token_dim", lambda x, rows, tokens: None)
    found = greedy(model, ids, mask, 6)
    assert {tokens for _, _, tokens in calls} == {LENGTH, 1}
    assert torch.equal(found.sequences, expected.sequences)
    assert [kept(found.past_key_values, r) for r in (0, 1)] == [kept(expected.past_key_values, r) for r in (0, 1)]


def test_what_is_told_of_the_inputs_of_layers():
    assert layers._token_dim(torch.zeros(2, 40, 64), 2, 40) == 1
    assert layers._token_dim(torch.zeros(1, 40, 40), 2, 40) == 1
    assert layers._token_dim(torch.zeros(2, 1, 40, 40), 2, 40) == 2  # a mask
    assert layers._token_dim(torch.zeros(7, 3), 2, 40) == layers._token_dim(None, 2, 40) == 0
    for shape in ((3, 1, 40, 16), (3, 2, 40), (40,), (40, 2), (2, 40, 1, 16), (2, 40, 40, 8)):
        assert layers._token_dim(torch.zeros(shape), 2, 40) is None


def test_the_pages_of_later_layers_are_never_taken():
    cache = greedy(model_of(PromptDistill(1, 7, truncate=-1)), prompt(400), new=1).past_key_values
    assert cache.nbytes == LAYERS * 2 * 2 * 4 * 2 * 16 * 4  # 8 entries are two pages of 4, of every head
    assert sum(s.reserved_bytes for s in cache.engine.storages.values()) < 3 * cache.nbytes


# -- batches, turns, drafts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PromptDistill(1, 9, truncate=1), PromptDistill((0, 3), (0.5, 0.25), truncate=-1)])
def test_rows_of_a_batch_choose_for_themselves(policy):
    rows = [prompt(n, seed=n)[0] for n in (LENGTH, 25, 8, 1)]
    model = model_of(policy)
    ids, mask = padded(rows, "left")
    out = greedy(model, ids, mask, 6)
    for r, row in enumerate(rows):
        alone = greedy(model, row[None], new=6)
        assert torch.equal(out.sequences[r, LENGTH:], alone.sequences[0, len(row) :])
        assert kept(out.past_key_values, r) == kept(alone.past_key_values)


@pytest.mark.parametrize("policy", [PromptDistill(1, 5), PromptDistill(1, 5, truncate=1)], ids=str)
def test_a_later_turn_drops_tokens_of_its_own(policy):
    model = model_of(policy)
    cache = kvcache.KVCache(model)
    with torch.no_grad():
        model(prompt(LENGTH), past_key_values=cache)
        model(prompt(1, seed=3), past_key_values=cache)
        before = kept(cache)
        model(prompt(20, seed=4), past_key_values=cache)
    turn = range(LENGTH + 1, LENGTH + 21)
    for i, (old, new) in enumerate(zip(before, kept(cache))):
        for a, b in zip(old, new):
            assert b[: len(a)] == a  # nothing of the first turn has left
            assert len(b) - len(a) == (20 if i < 2 and not policy.truncate else 6)
            assert set(b[len(a) :]) <= set(turn)
            assert b[-1] == turn[-1]
    assert cache.get_seq_length() == LENGTH + 21


@pytest.mark.parametrize(
    ("policy", "seed"),  # an assistant that says what the model without the policy would, and one that is mostly wrong
    [(PromptDistill(1, 9), 7), (PromptDistill((0, 2), (12, 6)), 0)],
)
def test_drafts_that_come_with_the_prompt_are_verified_by_all_layers(policy, seed):
    model, ids = model_of(policy), prompt(LENGTH)
    assistant = build("llama-gqa", seed, num_hidden_layers=LAYERS)
    plain = greedy(model, ids, new=12)
    drafted = greedy(model, ids, new=12, assistant_model=assistant)
    assert torch.equal(drafted.sequences, plain.sequences)
    n = min(x.past_key_values.seen_tokens for x in (plain, drafted))
    for a, b in zip(kept(plain.past_key_values), kept(drafted.past_key_values)):
        assert [[p for p in h if p < n] for h in a] == [[p for p in h if p < n] for h in b]
    kvcache.wrap(assistant, policy)  # which may drop tokens, too
    assert torch.equal(continued(model, ids, new=12, assistant_model=assistant), plain.sequences[:, LENGTH:])


def test_truncation_waits_for_word_of_the_drafts():
    """Drafts that come with the prompt read it whole in the layers that are truncated: then their tokens may differ."""
    policy = PromptDistill((0, 2), (12, 6), truncate=-1)
    assistant = build("llama-gqa", num_hidden_layers=LAYERS)
    cache = greedy(model_of(policy), prompt(LENGTH), new=12, assistant_model=assistant).past_key_values
    more = cache.seen_tokens - LENGTH
    assert lengths(cache) == [{13 + more}, *[{7 + more}] * 4]


def test_a_failure_in_a_later_layer_leaves_no_trace():
    model, ids = model_of(PromptDistill(1, 9, truncate=1)), prompt(LENGTH)
    turn = prompt(20, seed=4)
    expected = kvcache.KVCache(model)
    cache = kvcache.KVCache(model)

    def explode(module, args, output):
        raise KeyError("in the middle")

    with torch.no_grad():
        for c in (expected, cache):
            model(ids, past_key_values=c)
        handle = model.model.layers[3].mlp.register_forward_hook(explode)
        before = kept(cache)
        with pytest.raises(KeyError, match="in the middle"):
            model(turn, past_key_values=cache)
        handle.remove()
        assert kept(cache) == before
        assert cache.engine.step is None
        a, b = (model(turn, past_key_values=c).logits for c in (expected, cache))
    assert torch.equal(a, b)
    assert kept(cache) == kept(expected)


def test_hidden_states_keep_their_shape_and_what_is_dropped_its_values():
    model = model_of(PromptDistill(1, 9))
    with torch.no_grad():
        out = model(prompt(LENGTH), output_hidden_states=True)
    states = out.hidden_states
    assert all(x.shape == (1, LENGTH, 64) for x in states)
    left = out.past_key_values.positions(2, 0, 0)
    dropped = [t for t in range(LENGTH) if t not in left.tolist()]
    assert len(dropped) == LENGTH - 10
    assert torch.equal(states[3][:, dropped], states[2][:, dropped])
    assert not torch.isclose(states[3][:, left], states[2][:, left]).all(-1).any()


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": 1.5}, TypeError, "layer must be an int, got 1.5"),
        ({"layer": ()}, ValueError, "layer must name at least one layer"),
        ({"layer": (3, 1), "keep": (8, 4)}, ValueError, r"layer must name.* ascending order, got \(3, 1\)"),
        ({"keep": 0}, ValueError, "keep must be at least 1 tokens, got 0"),
        ({"keep": 1.5}, ValueError, r"keep as a share of the prompt must be in \(0, 1\], got 1.5"),
        ({"keep": "1MiB"}, TypeError, "keep must be an int .* got '1MiB'"),
        ({"keep": None}, TypeError, "keep must be.* got None"),
        ({"layer": (1, 2)}, ValueError, "keep must have one value per stage, 2 in all, got 1024"),
        ({"layer": (1, 2), "keep": (4, 8)}, ValueError, r"keep must fall from stage to stage, got \(4, 8\)"),
        ({"pool": 4}, ValueError, "pool must be odd.*got 4"),
        ({"pool": 0}, ValueError, "pool must be at least 1, got 0"),
        ({"truncate": 2}, ValueError, "truncate must be at most the 1 stages, got 2"),
        ({"truncate": -2}, ValueError, "truncate must be at least -1, got -2"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        PromptDistill(**options)


def test_text_form():
    assert str(PromptDistill()) == "promptdistill(layer=13, keep=1024, pool=5)"
    for policy in (PromptDistill(truncate=1), PromptDistill((1, 2), (0.5, 7), 3, truncate=-1)):
        assert kvcache.parse_policy(str(policy)) == policy


def test_wrap_names_the_layers_of_the_model():
    model = model_of()
    with pytest.raises(ValueError, match=r"no layer 13 among the 5 decoder layers of this model, 0 to 4"):
        kvcache.wrap(model, "promptdistill")
    with pytest.raises(ValueError, match="needs prompts at once, but prefill='chunked'"):
        kvcache.wrap(model, "promptdistill(layer=1)", prefill="chunked")
    kvcache.wrap(model, "full", prefill="chunked")
    with pytest.raises(ValueError, match="needs prompts at once"):
        kvcache.KVCache(model, "promptdistill(layer=1)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promptdistill | promptdistill", "both decide the token routing"),
        ("promptdistill | skipdecode", "both decide which layers a token runs"),
        ("skipdecode | promptdistill", "both decide which layers a token runs"),
        ("tokenselect | promptdistill", "TokenSelect reads from everything that was seen, but PromptDistill"),
        ("promptdistill(truncate=1) | h2o", "both decide the retention"),
    ],
)
def test_compositions_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        kvcache.parse_policy(text)


def test_models_that_are_refused():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    latent = build("deepseek-v3")
    for model, message in ((latent, "makes keys of what is cached"), (bloom, "computes attention itself")):
        with pytest.raises(ValueError, match=message):
            kvcache.wrap(model, PromptDistill(0, 4))


def test_generate_batch_reads_prompts_whole():
    from transformers import ContinuousBatchingConfig

    model = model_of(PromptDistill(1, 9, truncate=1))
    prompts = [prompt(n, seed=n)[0].tolist() for n in (LENGTH, 25, 8)]
    wanted = [continued(model, torch.tensor([x]), new=8)[0].tolist() for x in prompts]
    options = ContinuousBatchingConfig(max_batch_tokens=10)
    found = model.generate_batch(prompts, continuous_batching_config=options, max_new_tokens=8, do_sample=False)
    assert [x.generated_tokens for x in found.values()] == wanted
