"""GemFilter generates what the model generates from the tokens that its rule leaves of a prompt."""

import pytest
import torch
from support.dense import DistillOracle, dense_logits
from support.models import build, continued, greedy, padded, prompt
from support.runs import kept, run
from transformers import BloomConfig, BloomForCausalLM

import kvcache
from kvcache import layers
from kvcache.policies import GemFilter

LAYERS, LENGTH, NEW = 5, 40, 8


def model_of(policy=None, name="llama-gqa", **options):
    model = build(name, **({"n_layer": LAYERS} if name == "gpt2" else {"num_hidden_layers": LAYERS}))
    return model if policy is None else kvcache.wrap(model, policy, page_size=4, **options)


def listed(ids, layer, keep, name="llama-gqa", start=0, pool=5):
    """What the rule leaves of the tokens of ``ids`` [1, T] from ``start`` on, by dense attention over all of them."""
    tokens = ids.shape[1]
    oracle = DistillOracle({}, [(layer, keep)], pool, tokens, tokens)
    oracle.on = lambda i: list(range(start, tokens)) if i == layer else list(range(tokens))
    oracle.runs = lambda i: torch.ones(tokens, dtype=torch.bool)
    dense_logits(model_of(name=name), ids, oracle)
    return oracle.kept[layer]


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha", "gpt2", "opt"])
def test_generates_from_what_it_keeps_as_if_nothing_else_were_there(name):
    ids = prompt(LENGTH)
    out = greedy(model_of(GemFilter(2, 9), name), ids, new=NEW)
    read = listed(ids, 2, 9, name)
    assert len(read) == 10
    assert read != list(range(LENGTH - 10, LENGTH))
    assert torch.equal(out.sequences[:, LENGTH:], continued(model_of(name=name), ids[:, read], new=NEW))
    assert not torch.equal(out.sequences[:, LENGTH:], continued(model_of(name=name), ids, new=NEW))
    cache = out.past_key_values
    assert cache.get_seq_length() == LENGTH + NEW - 1  # tokens seen
    for i in range(LAYERS):
        assert cache.kept(i).unique().tolist() == [10 + NEW - 1]
        assert cache.positions(i, 0, 0).tolist() == list(range(10 + NEW - 1))  # positions without gaps


def test_the_first_forward_ends_at_its_layer_and_the_second_reads_little(monkeypatch):
    calls, forward = [], layers.RoutedForward._run

    def spy(self, args, kwargs):
        calls.append((self.index, *(args[0] if args else kwargs["hidden_states"]).shape[:2]))
        return forward(self, args, kwargs)

    monkeypatch.setattr(layers.RoutedForward, "_run", spy)
    ids, mask = padded([prompt(LENGTH)[0], prompt(12, seed=2)[0]], "left")
    greedy(model_of(GemFilter(1, 6)), ids, mask, 2)
    assert calls == [(0, 2, 40), (1, 2, 40), *((i, 2, 7) for i in range(LAYERS)), *((i, 2, 1) for i in range(LAYERS))]


@pytest.mark.parametrize("policy", [GemFilter(1, 39), GemFilter(4, 1.0)])
def test_room_for_the_prompt_changes_nothing(policy):
    assert torch.equal(continued(model_of(policy), prompt(LENGTH)), continued(model_of(), prompt(LENGTH)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_choose_for_themselves(side):
    rows = [prompt(n, seed=n)[0] for n in (LENGTH, 25, 1)]
    model, (ids, mask) = model_of(GemFilter(1, 0.25)), padded(rows, side)
    later = prompt(6, seed=3, rows=3)
    batch = run(model, torch.cat([ids, later], 1), LENGTH, torch.cat([mask, torch.ones_like(later)], 1))
    for r, row in enumerate(rows):
        alone = run(model, torch.cat([row[None], later[r : r + 1]], 1), len(row))
        assert (batch.logits[r, LENGTH:] - alone.logits[0, len(row) :]).abs().max() < 5e-5
        assert kept(batch.cache, r) == kept(alone.cache)


def test_a_later_turn_is_filtered_by_its_own_last_query():
    model = model_of(GemFilter(1, 7))
    cache = kvcache.KVCache(model)
    first, turn = prompt(LENGTH), prompt(20, seed=4)
    with torch.no_grad():
        model(first, past_key_values=cache)
        logits = model(turn, past_key_values=cache).logits[:, -1]
        context = torch.cat([first[:, listed(first, 1, 7)], turn], 1)
        read = [*range(8), *listed(context, 1, 7, start=8)]
        assert len(read) == 16
        expected = model_of()(context[:, read]).logits[:, -1]
    assert (logits - expected).abs().max() < 5e-5
    assert cache.get_seq_length() == LENGTH + 20
    assert all((cache.kept(i) == 16).all() for i in range(LAYERS))


def test_the_first_forward_takes_no_pages_of_the_pool():
    model = model_of(GemFilter(1, 7), max_tokens=60)
    cache = greedy(model, prompt(200), new=NEW).past_key_values
    assert cache.kept(0).unique().tolist() == [8 + NEW - 1]


def test_with_a_policy_that_evicts():
    ids = prompt(LENGTH)
    found = continued(model_of("gemfilter(layer=2, keep=20) | knorm(keep=6)", "qwen2"), ids, new=NEW)
    read = listed(ids, 2, 20, "qwen2")
    assert torch.equal(found, continued(model_of("knorm(keep=6)", "qwen2"), ids[:, read], new=NEW))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": (1, 2)}, TypeError, r"layer must be an int, got \(1, 2\)"),
        ({"keep": 0}, ValueError, "keep must be at least 1 tokens, got 0"),
        ({"keep": "1MiB"}, TypeError, "keep must be an int .* got '1MiB'"),
        ({"keep": (4,)}, TypeError, r"keep must be an int .* got \(4,\)"),
        ({"pool": 2}, ValueError, "pool must be odd.*got 2"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        GemFilter(**options)


def test_what_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"^gemfilter.*: there is no layer 13 among the 5 decoder layers"):
        kvcache.wrap(model, "gemfilter")
    with pytest.raises(ValueError, match="gemfilter.*needs prompts at once, but prefill='chunked'"):
        kvcache.wrap(model, "gemfilter(layer=1)", prefill="chunked")
    kvcache.wrap(model, "gemfilter(layer=1, keep=4)")
    with pytest.raises(ValueError, match="gemfilter.*needs the prompt at once.* got 10 of the 40"):
        greedy(model, prompt(LENGTH), prefill_chunk_size=10)
    with pytest.raises(ValueError, match=r"gemfilter.* needs attention_mask of two dimensions, got \(1, 1, 40, 40\)"):
        model(prompt(LENGTH), attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="both decide the token routing"):
        kvcache.parse_policy("gemfilter | promptdistill")
    with pytest.raises(ValueError, match="both decide which layers a token runs"):
        kvcache.parse_policy("gemfilter | skipdecode")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="computes attention itself"):
        kvcache.wrap(bloom, GemFilter(0, 4))


def test_text_form():
    assert str(GemFilter()) == "gemfilter(layer=13, keep=1024, pool=5)"
    assert kvcache.parse_policy(str(GemFilter(2, 0.5, 3))) == GemFilter(2, 0.5, 3)


def test_a_failure_in_the_first_forward_leaves_no_trace():
    model, ids = model_of(GemFilter(1, 7)), prompt(LENGTH)
    expected = continued(model, ids, new=NEW)
    cache = kvcache.KVCache(model)

    def explode(module, args, output):
        raise KeyError("in the middle")

    handle = model.model.layers[0].mlp.register_forward_hook(explode)
    with pytest.raises(KeyError, match="in the middle"):
        model(ids, past_key_values=cache)
    handle.remove()
    assert cache.seen_tokens == 0
    assert torch.equal(continued(model, ids, new=NEW, past_key_values=cache), expected)
