"""KVzip: what stays of a context is what dense attention says of its replay, and what is read afterwards reads that."""

import math

import pytest
import torch
from support.dense import Oracle, Replay, dense_logits
from support.models import build, continued, padded, prompt
from support.runs import kept

import kvcache

LAYERS, CONTEXT = 3, 40
REPEAT = torch.tensor([90, 91, 92])


class Recorded(Oracle):
    """Queries and keys of every layer."""

    def __init__(self):
        self.found = {}

    def attend(self, layer, q, k, v, causal, logits):
        self.found[layer] = q, k
        return super().attend(layer, q, k, v, causal, logits)


def expected_scores(model, ids, chunk, lead, repeat=REPEAT):
    """[layers][heads][context], by one dense forward over context and replay for each chunk."""
    n = len(ids)
    scores = None
    for first in range(0, n, chunk):
        end = min(first + chunk, n)
        replay = torch.cat([repeat, ids[max(first - lead, 0) : end]])
        oracle = Recorded()
        dense_logits(model, torch.cat([ids, replay])[None], oracle)
        for layer, (q, k) in oracle.found.items():
            heads = k.shape[0]
            scores = torch.zeros(LAYERS, heads, n, dtype=torch.float64) if scores is None else scores
            for h in range(q.shape[0]):
                own = h * heads // q.shape[0]
                for t in range(n, n + len(replay)):
                    listed = [*range(first, end), *range(n, t + 1)]
                    p = (k[own, listed] @ q[h, t] / math.sqrt(q.shape[2])).softmax(0)[: end - first]
                    scores[layer, own, first:end] = torch.maximum(scores[layer, own, first:end], p)
    return scores


def expected_kept(scores, keep):
    """[layers][heads] -> positions: the best of each head for sure, then the best of all."""
    layers, heads, n = scores.shape
    order = sorted(
        ((layer, h, p) for layer in range(layers) for h in range(heads) for p in range(n)),
        key=lambda x: -float(scores[x]),
    )
    sure = [max(range(n), key=lambda p: float(scores[layer, h, p])) for layer in range(layers) for h in range(heads)]
    chosen = {(i // heads, i % heads, p) for i, p in enumerate(sure)}
    for entry in order:
        if len(chosen) < keep * layers * heads:
            chosen.add(entry)
    return [[sorted(p for a, b, p in chosen if (a, b) == (layer, h)) for h in range(heads)] for layer in range(layers)]


@torch.no_grad()
def read(model, ids, cache=None, mask=None):
    cache = kvcache.KVCache(model) if cache is None else cache
    extra = {}
    if mask is not None:
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    return model(ids, past_key_values=cache, **extra).logits, cache


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha", "qwen3"])
@pytest.mark.parametrize(("chunk", "lead"), [(2048, 8), (15, 4)])
def test_what_stays_is_what_the_replay_reads(name, chunk, lead, backend):
    model, ids = build(name), prompt(CONTEXT, seed=3)
    scores = expected_scores(model, ids[0], chunk, lead)
    kvcache.wrap(model, page_size=4)
    _, cache = read(model, ids)
    (storage,) = cache.engine.storages.values()
    kvcache.compress(model, cache, ids, 9, repeat=REPEAT, chunk=chunk, lead=lead)
    found = kept(cache)
    assert found == expected_kept(scores, 9)
    assert len({len(head) for layer in found for head in layer}) > 1
    assert storage.pool.used == sum(-(-len(head) // 4) for layer in found for head in layer)
    assert sum(row["evictions"] for row in cache.report().rows) == (CONTEXT - 9) * sum(map(len, found))
    # A question and its answer stay whole, and read what stayed.
    question = prompt(8, seed=4)
    logits = [read(model, part, cache)[0] for part in (question[:, :5], *question[:, 5:].split(1, 1))]
    assert [[head[-8:] for head in layer] for layer in kept(cache)] == [[list(range(40, 48))] * len(found[0])] * 3
    kvcache.unwrap(model)
    log = {t: [[[*head, *range(CONTEXT, t)] for head in layer] for layer in found] for t in range(CONTEXT, CONTEXT + 8)}
    expected = dense_logits(model, torch.cat([ids, question], 1), Replay(log))[CONTEXT:]
    assert (torch.cat(logits, 1)[0] - expected).abs().max() < 5e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch(side):
    model, rows = kvcache.wrap(build()), [prompt(n, seed=20 + n) for n in (CONTEXT, 23)]
    ids, mask = padded([row[0] for row in rows], side)
    _, cache = read(model, ids, mask=mask)
    kvcache.compress(model, cache, ids, 0.3, chunk=16)
    for r, row in enumerate(rows):
        _, alone = read(model, row)
        kvcache.compress(model, alone, row, 0.3, chunk=16)
        assert kept(cache, r) == kept(alone)
        assert sum(len(head) for layer in kept(alone) for head in layer) == int(0.3 * row.shape[1]) * LAYERS * 2


def test_generate_goes_on_with_a_compressed_context():
    model, ids = kvcache.wrap(build()), prompt(CONTEXT, seed=3)
    _, cache = read(model, ids)
    whole = torch.cat([ids, prompt(6, seed=7)], 1)
    dense = continued(model, whole, new=10)
    untouched = cache.fork()
    kvcache.compress(model, cache, ids, 6)
    tokens = continued(model, whole, new=10, past_key_values=cache.fork())
    assert not torch.equal(tokens, dense)
    assert torch.equal(continued(model, whole, new=10, past_key_values=untouched), dense)
    assert torch.equal(continued(model, whole, new=10, past_key_values=cache), tokens)  # one context, several questions


def test_a_budget_for_everything_changes_nothing():
    model, ids = kvcache.wrap(build()), prompt(CONTEXT, seed=3)
    _, cache = read(model, ids)
    kvcache.compress(model, cache, ids, 1.0)
    assert kept(cache) == [[list(range(CONTEXT))] * 2] * LAYERS
    expected, _ = read(model, torch.cat([ids, prompt(5, seed=7)], 1))
    found, _ = read(model, prompt(5, seed=7), cache)
    assert (found - expected[:, CONTEXT:]).abs().max() < 5e-5


def test_layers_with_a_window_keep_it():
    model, ids = kvcache.wrap(build("gemma3")), prompt(CONTEXT, seed=3)
    _, cache = read(model, ids)
    kvcache.compress(model, cache, ids, 10)
    counts = [cache.kept(i)[0].tolist() for i in range(4)]
    assert counts[0] == counts[2] == [15, 15]
    assert sum(counts[1]) + sum(counts[3]) == 4 * 10


def refused(model, cache, ids, error, message, **options):
    before = kept(cache)
    with pytest.raises(error, match=message):
        kvcache.compress(model, cache, ids, **options)
    assert kept(cache) == before


def test_what_cannot_be_compressed_is_named_and_untouched():
    model, ids = kvcache.wrap(build(), page_size=4), prompt(12)
    _, cache = read(model, ids)
    for options, error, message in (
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"keep": None}, TypeError, "keep must be an int"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"lead": -1}, ValueError, "lead must be at least 0"),
        ({"repeat": ids}, ValueError, r"repeat must be token ids \[tokens\]"),
    ):
        refused(model, cache, ids, error, message, **options)
    refused(
        model, cache, ids[:, 1:], ValueError, r"input_ids must be the token ids \[1, 12\] in the cache, got \[1, 11\]"
    )
    with pytest.raises(ValueError, match="cache must hold a complete context"):
        kvcache.compress(model, kvcache.KVCache(model), ids)
    with pytest.raises(TypeError, match="cache must be a kvcache.KVCache, got list"):
        kvcache.compress(model, [], ids)
    h2o = kvcache.KVCache(model, "h2o(heavy=4, recent=4)")
    read(model, ids, h2o)
    refused(model, h2o, ids, ValueError, r"keeps and reads everything, not h2o\(heavy=4, recent=4\)")
    kvcache.compress(model, cache, ids, 5)
    refused(model, cache, ids, ValueError, "cache must hold every token of the context, but layer 0 does not")
    kvcache.unwrap(model)
    refused(model, cache, ids, ValueError, "Qwen3ForCausalLM is not wrapped")
    other = kvcache.wrap(build("deepseek-v3"))
    refused(other, read(other, ids)[1], ids, ValueError, "layers without queries and keys of their own")
    other = kvcache.wrap(build("mistral"))
    refused(other, read(other, ids)[1], ids, ValueError, "no layer without a sliding window")


def test_without_room_for_the_replay_nothing_changes():
    model, ids = kvcache.wrap(build(), page_size=4, max_tokens=16), prompt(12)
    _, cache = read(model, ids)
    refused(model, cache, ids, kvcache.OutOfPages, "max_tokens")
    pool = next(iter(cache.engine.storages.values())).pool
    assert pool.used == 3 * LAYERS * 2
