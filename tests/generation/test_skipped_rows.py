"""Rows at different positions under SkipDecode: a layer runs on those that need it alone."""

import pytest
import torch
from support.gates import random_gates
from support.models import build, prompt

import kvcache
from kvcache import layers
from kvcache.policies import SkipDecode

POLICY = SkipDecode(min_layers=2, max_layers=5, horizon=30)
LENGTHS, LAYERS, NEW = (6, 12, 20, 28), 6, 10


@pytest.fixture
def calls(monkeypatch):
    """(layer, rows, tokens) of every run of a decoder layer."""
    found = []
    run = layers.RoutedForward._run

    def spy(self, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append((self.index, *hidden.shape[:2]))
        return run(self, args, kwargs)

    monkeypatch.setattr(layers.RoutedForward, "_run", spy)
    return found


def padded():
    width = max(LENGTHS)
    ids = torch.cat([prompt(width, seed=i) for i in range(len(LENGTHS))])
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def new_tokens(model, ids, mask, policy=None):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    if policy is not None:
        kvcache.wrap(model, policy)
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        POLICY | kvcache.H2O(8, 6),
        POLICY | kvcache.TokenSelect(k=5, sinks=1, local=4, reuse=0.4, chunk=4),
        POLICY | kvcache.TrimKV(random_gates(LAYERS), 12, slack=0),
    ],
    ids=["alone", "h2o", "tokenselect", "trimkv"],
)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt"])
def test_rows_that_skip_a_layer_are_not_computed(name, policy, calls):
    if name != "llama-gqa" and policy is not POLICY:
        return
    model = build(name, **({"n_layer": LAYERS} if name == "gpt2" else {"num_hidden_layers": LAYERS}))
    ids, mask = padded()
    together = new_tokens(model, ids, mask, policy)
    steps = [c for c in calls if c[2] == 1]
    wanted = []
    for step in range(NEW - 1):
        depths = POLICY.depth(torch.tensor(LENGTHS) + step).tolist()
        for layer in range(LAYERS):
            rows = sum(layer < POLICY.warmup or layer >= LAYERS - (n - POLICY.warmup) for n in depths)
            wanted += [(layer, rows, 1)] * (rows > 0)
    assert steps == wanted
    assert len({rows for _, rows, _ in steps}) == 4
    for r, length in enumerate(LENGTHS):
        assert torch.equal(together[r : r + 1], new_tokens(model, ids[r : r + 1, -length:], mask[r : r + 1, -length:]))


def test_what_no_row_can_be_told_from_runs_whole(calls, monkeypatch):
    """A batch of three under positions of three kinds: [3, 3, 1] might be either, so that every row is computed."""
    assert layers._is_batch(torch.zeros(3, 1, 8), 3, 1) is True
    assert layers._is_batch(torch.zeros(1, 1, 8), 3, 1) is False
    for shape in ((3, 3, 1), (3, 3, 1, 8), (3,), (5, 3, 8), (3, 1, 1, 9)):
        assert layers._is_batch(torch.zeros(shape), 3, 1) is None
    assert layers._is_batch(torch.zeros(3, 3, 8), 3, 3) is None
    model = build("llama-gqa", num_hidden_layers=LAYERS)
    ids, mask = padded()
    together = new_tokens(model, ids, mask, POLICY)
    calls.clear()
    monkeypatch.setattr(layers, "_is_batch", lambda *args: None)
    assert torch.equal(new_tokens(model, ids, mask), together)
    assert {rows for _, rows, tokens in calls if tokens == 1} == {len(LENGTHS)}


def test_a_failure_in_a_layer_of_some_rows_leaves_no_trace(calls):
    model = build("llama-gqa", num_hidden_layers=LAYERS)
    ids, mask = padded()
    expected = new_tokens(model, ids, mask, POLICY)
    cache = kvcache.KVCache(model)

    def explode(module, args, output):
        if output.shape[0] not in (1, len(LENGTHS)) and output.shape[1] == 1:
            raise KeyError("in the middle")

    handle = model.model.layers[3].mlp.register_forward_hook(explode)
    with pytest.raises(KeyError, match="in the middle"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    handle.remove()
    assert cache.engine.step is None
    assert torch.equal(new_tokens(model, ids, mask), expected)
