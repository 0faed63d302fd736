"""``prefill="chunked"``: the policy evicts after every chunk of a prompt, and memory stays near budget + chunk."""

import pytest
import torch
from support.engines import engine, held, scores, step
from support.models import build, continued, greedy, padded, prompt

import kvcache
from kvcache.engine import Engine

LENGTH, CHUNK, PAGE = 120, 10, 4
BUDGETS = {  # policy -> entries that a head keeps of a prompt of LENGTH tokens
    "streamingllm(sinks=2, window=10)": 12,
    "h2o(heavy=6, recent=6)": 12,
    "h2o(heavy=0.05, recent=0.05)": 12,
    "randomeviction(keep=0.1, sinks=1, recent=2)": 12,
    "h2o(heavy=6, recent=6) | skipdecode(min_layers=1, max_layers=2, horizon=200)": 12,
    "keydiff(keep=12, recent=3)": 12,
    "expectedattention(keep=12, horizon=20)": 12,
}


@pytest.fixture
def log(monkeypatch):
    """Of every forward: pages in use before it evicts, and the positions kept by [layer][row][head] after it."""
    entries, finish = [], Engine.finish

    def record(self):
        pages = sum(s.pool.used for s in self.storages.values())
        finish(self)
        kept = []
        for layer in self.layers:
            p, n = layer.store.positions, layer.store.counts
            kept.append([[sorted(p[r, h, : n[r, h]].tolist()) for h in range(2)] for r in range(len(n))])
        entries.append((pages, kept))

    monkeypatch.setattr(Engine, "finish", record)
    return entries


@pytest.mark.parametrize("policy", BUDGETS)
def test_memory_of_the_prefill_is_that_of_budget_and_chunk(policy, log):
    chunks = LENGTH // CHUNK
    peaks, reserved = {}, {}
    for mode in ("whole", "chunked"):
        model = kvcache.wrap(build(num_hidden_layers=2), policy, page_size=PAGE, prefill=mode)
        log.clear()
        out = greedy(model, prompt(LENGTH), new=8, prefill_chunk_size=CHUNK)
        peaks[mode] = max(pages for pages, _ in log[:chunks])
        reserved[mode] = out.past_key_values.report().reserved_nbytes
        assert out.past_key_values.seen_tokens == LENGTH + 7
        for layer in range(2):
            assert out.past_key_values.kept(layer).max() == BUDGETS[policy]
    heads = 2 * 2
    assert peaks["whole"] == heads * LENGTH // PAGE
    # A head's entries leave gaps in at most one page.
    assert peaks["chunked"] <= heads * (-(-(BUDGETS[policy] + CHUNK) // PAGE) + 1)
    assert peaks["chunked"] < peaks["whole"] / 4
    # Shares mean the whole prompt from the first chunk on.
    assert all(len(x) == CHUNK for x in log[0][1][0][0])
    assert all(len(x) == BUDGETS[policy] for _, kept in log[1:chunks] for x in kept[0][0])


def test_streamingllm_keeps_sinks_and_window_after_every_chunk(log):
    model = kvcache.wrap(build(num_hidden_layers=2), "streamingllm(sinks=2, window=7)", prefill="chunked")
    greedy(model, prompt(40), new=1, prefill_chunk_size=8)
    for n, (_, kept) in enumerate(log, 1):
        expected = [p for p in range(8 * n) if p < 2 or p >= 8 * n - 7]
        assert all(head == expected for layer in kept for head in layer[0]), n
    assert len(log) == 5


def test_the_tail_of_lagkv_survives_every_chunk(log):
    """What has no reference yet stays, and after a chunk a head is within its budget, slack or not."""
    model = kvcache.wrap(build(num_hidden_layers=2), "lagkv(keep=12, sinks=1, lag=4)", prefill="chunked")
    greedy(model, prompt(50), new=1, prefill_chunk_size=10)
    for n, (_, kept) in enumerate(log, 1):
        tail = (10 * n - 1) % 4 + 4
        for head in (x for layer in kept for x in layer[0]):
            assert len(head) == min(12, 10 * n)
            assert head[0] == 0
            assert head[-tail:] == list(range(10 * n - tail, 10 * n))
    assert len(log) == 5


def test_the_newest_entries_of_h2o_survive_every_chunk(log):
    model = kvcache.wrap(build(num_hidden_layers=2), "h2o(heavy=4, recent=5)", prefill="chunked")
    greedy(model, prompt(48), new=1, prefill_chunk_size=8)
    for n, (_, kept) in enumerate(log, 1):
        assert all(head[-5:] == list(range(8 * n - 5, 8 * n)) for layer in kept for head in layer[0])


def test_a_hash_keeps_the_same_entries_in_chunks(log):
    """What random eviction keeps at the end does not depend on when the rest left."""
    found = []
    for mode in ("whole", "chunked"):
        policy = "randomeviction(keep=0.2, sinks=2, recent=3)"
        model = kvcache.wrap(build(num_hidden_layers=2), policy, prefill=mode)
        greedy(model, prompt(60), new=1, prefill_chunk_size=7)
        found.append(log[-1][1])
    assert found[0] == found[1]


def test_shares_are_those_of_each_row(log):
    ids, mask = padded([prompt(n, seed=n)[0] for n in (60, 25)], "left")
    model = kvcache.wrap(build(num_hidden_layers=2), "h2o(heavy=0.1, recent=0.1)", prefill="chunked")
    greedy(model, ids, mask, new=4, prefill_chunk_size=20)
    lengths = [[[len(head) for head in row] for row in kept[0]] for _, kept in log[:3]]
    # The second row's prompt begins in column 35: 0, 5 and 25 real tokens after the chunks; its budget is 2 + 2.
    assert lengths == [[[12, 12], [0, 0]], [[12, 12], [4, 4]], [[12, 12], [4, 4]]]


@pytest.mark.parametrize("policy", ["full", "streamingllm", "h2o(heavy=100, recent=100)", "randomeviction(keep=100)"])
def test_with_room_for_everything_chunks_change_nothing(policy):
    model = build()
    ids, mask = padded([prompt(n, seed=n)[0] for n in (50, 33)], "left")
    expected = continued(model, ids, mask)
    kvcache.wrap(model, policy, prefill="chunked")
    assert torch.equal(continued(model, ids, mask, prefill_chunk_size=9), expected)


def test_one_chunk_is_the_whole_prompt_and_beams_share_it():
    model = kvcache.wrap(build(), "h2o(heavy=5, recent=4)", prefill="whole")
    ids = prompt(40)
    expected = continued(model, ids)
    beams = continued(model, ids, num_beams=3)
    kvcache.wrap(model, "h2o(heavy=5, recent=4)", prefill="chunked")
    assert torch.equal(continued(model, ids), expected)
    assert torch.equal(continued(model, ids, prefill_chunk_size=40), expected)
    assert torch.equal(continued(model, ids, num_beams=3, prefill_chunk_size=40), beams)
    assert not torch.equal(continued(model, ids, prefill_chunk_size=8), expected)  # it does evict earlier


def test_a_windowed_layer_in_chunks_is_exact():
    model = build("mistral")
    expected = continued(model, prompt(60))
    kvcache.wrap(model, "full", prefill="chunked")
    assert torch.equal(continued(model, prompt(60), prefill_chunk_size=7), expected)


def reference(q, k, chunk, heavy, recent):
    """H2O in chunks for one head in plain torch: position -> sum of the probabilities it got, for those kept."""
    kept, total = [], {}
    for start in range(0, len(q), chunk):
        kept += range(start, start + chunk)
        total |= dict.fromkeys(range(start, start + chunk), 0.0)
        for t in range(start, start + chunk):
            seen = [p for p in kept if p <= t]
            for p, weight in zip(seen, torch.softmax(k[seen] @ q[t], 0).tolist()):
                total[p] += weight
        old = [p for p in kept if p < start + chunk - recent]
        best = sorted(old, key=lambda p: -total[p])[:heavy]
        kept = sorted(best + [p for p in kept if p >= start + chunk - recent])
    return {p: total[p] for p in kept}


def test_scores_of_h2o_accumulate_over_the_chunks():
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, 1, 40, 8, generator=generator)
    e = engine(kvcache.H2O(0.1, 0.15), prefill="chunked")
    e.prompt_length = 40
    for piece in range(0, 40, 8):
        part = slice(piece, piece + 8)
        step(e, q[:, :, part], k[:, :, part], v[:, :, part])
    expected = reference(q[0, 0], k[0, 0], 8, heavy=4, recent=6)
    assert held(e) == sorted(expected)
    assert all(abs(scores(e)[p] - expected[p]) < 1e-4 for p in expected)


def test_a_cache_may_say_otherwise_and_forks_keep_it():
    model = kvcache.wrap(build(), "h2o(heavy=5, recent=4)")
    cache = kvcache.KVCache(model, prefill="chunked")
    assert cache.fork().engine.prefill == "chunked"
    assert kvcache.KVCache(model).engine.prefill == "whole"
    found = continued(model, prompt(40), past_key_values=cache, prefill_chunk_size=8)
    kvcache.wrap(model, "h2o(heavy=5, recent=4)", prefill="chunked")
    assert torch.equal(continued(model, prompt(40), prefill_chunk_size=8), found)
    with pytest.raises(ValueError, match="prefill must be one of"):
        kvcache.KVCache(model, prefill="half")
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="prefill must be one of.*got 'half'"):
        kvcache.wrap(model, "full", prefill="half")
    assert model.__dict__ == before
