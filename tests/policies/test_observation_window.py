"""SnapKV, PyramidKV, AdaKV and TOVA keep exactly what their papers' rules say, by dense attention in plain torch."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from support.dense import Oracle, dense_logits
from support.engines import engine, held, scores, step, unit
from support.models import build, greedy, padded, prompt
from support.runs import kept, run

import kvcache
from kvcache import TOVA, AdaKV, CriticalKV, PyramidKV, SnapKV
from kvcache.policies.adakv import share_out
from kvcache.policies.pyramidkv import pyramid

LAYERS = 3
PROMPT, TURN = 40, 11
#: Forwards of a conversation of 62 tokens: a prompt, four tokens, another prompt, seven tokens.
ONE_BY_ONE = [range(t, t + 1) for t in range(62)]
CHAT = [range(PROMPT), *ONE_BY_ONE[40:44], range(44, 44 + TURN), *ONE_BY_ONE[55:]]
RULES = {
    "snapkv": SnapKV(13, 6, 3),
    "snapkv-max": SnapKV(13, 6, 5, pooling="max"),
    "snapkv-unpooled": SnapKV(0.3, 4, 1),
    "snapkv-short": SnapKV(14, 13, 3),  # the second turn is shorter than the window
    "snapkv-evict": SnapKV(13, 6, 3, generated="evict"),
    "pyramidkv": PyramidKV(13, 6, 3, beta=3),
    "adakv": AdaKV(13, 6, 3),
    "adakv-evict": AdaKV(13, 6, 3, generated="evict"),
    "adakv-even": AdaKV(13, 6, 3, floor=1.0),
    "criticalkv": CriticalKV(13, 6, 3),
    "criticalkv-evict": CriticalKV(0.3, 6, 5, share=0.2, generated="evict"),
    "tova": TOVA(12),
    "tova-protected": TOVA(12, sinks=2, recent=3),
}


def pooled(values, size, kind):
    half = size // 2
    out = []
    for i in range(len(values)):
        near = [values[j] if 0 <= j < len(values) else 0.0 for j in range(i - half, i + half + 1)]
        out.append(max(near) if kind == "max" else math.fsum(near) / size)
    return out


@dataclass
class WindowOracle(Oracle):
    """What each head holds after each forward, decided with lists of positions and dense probabilities."""

    policy: object
    steps: list
    model: object
    layers: int = LAYERS
    kept: dict = field(default_factory=dict)  # (layer, tokens seen) -> head -> positions
    gap: float = math.inf  # smallest relative distance between the last that stays and the first that leaves
    prompt_tokens: int = 0

    def attend(self, layer, q, k, v, causal, logits):
        if isinstance(self.policy, CriticalKV):  # of each token what its value adds to the hidden state, by kv head
            weight = self.model.model.layers[layer].self_attn.o_proj.weight.double()
            group, size = q.shape[0] // k.shape[0], v.shape[2]
            of_query_heads = [
                (v[h // group] @ weight[:, h * size : (h + 1) * size].T).abs().sum(1) for h in range(q.shape[0])
            ]
            self.norms = torch.stack(of_query_heads).unflatten(0, (-1, group)).mean(1)
        return super().attend(layer, q, k, v, causal, logits)

    def visible(self, layer, q, k, probabilities):
        heads, tokens = k.shape[0], q.shape[1]
        seen = super().visible(layer, q, k, probabilities)
        holds = [[] for _ in range(heads)]
        worth = torch.zeros(heads, tokens, dtype=torch.float64)
        budgets = None
        for i, now in enumerate(self.steps):
            for h in range(heads):
                seen[h, now.start : now.stop] = False
                for t in now:
                    seen[h, t, [*holds[h], *range(now.start, t + 1)]] = True
                holds[h] = [*holds[h], *now]
            p = probabilities(seen).view(heads, -1, tokens, tokens).mean(1)
            ends_prompt = i == 0 or len(now) > 1
            if isinstance(self.policy, TOVA):
                worth = p[:, now.stop - 1].mean(0, keepdim=True).expand(heads, -1)
            elif ends_prompt:
                worth = p[:, max(now.start, now.stop - self.policy.window) : now.stop].sum(1)
            if ends_prompt:
                self.prompt_tokens = now.stop
                budgets = self.budgets(layer, now.stop, holds, worth)
            if ends_prompt or self.policy.generated == "evict":
                holds = [self.choose(now.stop, holds[h], worth[h], budgets[h], h) for h in range(heads)]
            self.kept[layer, now.stop] = [sorted(x) for x in holds]
        return seen

    def amount(self, tokens):
        keep = self.policy.keep
        return int(keep * tokens) if isinstance(keep, float) else keep

    def scored(self, tokens, holds, worth):
        """Unprotected positions of a head with what they are worth."""
        if isinstance(self.policy, TOVA):
            return {p: float(worth[p]) for p in holds if self.policy.sinks <= p < tokens - self.policy.recent}
        order, end = sorted(holds), tokens - min(self.policy.window, self.amount(self.prompt_tokens))
        raw = [float(worth[p]) if p < end else 0.0 for p in order]
        values = dict(zip(order, pooled(raw, self.policy.pool, self.policy.pooling)))
        return {p: x for p, x in values.items() if p < end}

    def budgets(self, layer, tokens, holds, worth):
        heads, keep = len(holds), self.amount(tokens)
        if isinstance(self.policy, PyramidKV):
            shares = exact_pyramid(keep - self.policy.window, self.layers, self.policy.beta)
            return [self.policy.window + shares[layer]] * heads
        if not isinstance(self.policy, AdaKV):
            return [keep] * heads
        share = keep - self.policy.window
        lists = [self.scored(tokens, holds[h], worth[h]) for h in range(heads)]
        best = [sorted(x, key=lambda p, x=x: (-x[p], p)) for x in lists]
        sure = int(self.policy.floor * share)
        chosen = {(h, p) for h in range(heads) for p in best[h][:sure]}
        rest = [(h, p) for h in range(heads) for p in lists[h] if (h, p) not in chosen]
        rest.sort(key=lambda x: (-lists[x[0]][x[1]], x))
        chosen |= set(rest[: heads * share - len(chosen)])
        spare = heads * share - len(chosen)
        return [
            self.policy.window + sum(x[0] == h for x in chosen) + spare // heads + (h < spare % heads)
            for h in range(heads)
        ]

    def choose(self, tokens, holds, worth, budget, head):
        if len(holds) <= budget:
            return holds
        values = self.scored(tokens, holds, worth)
        safe = [p for p in holds if p not in values]
        best = sorted(values, key=lambda p: (-values[p], p))
        n = max(budget - len(safe), 0)
        if isinstance(self.policy, CriticalKV):
            first = int(self.policy.share * (budget - min(self.policy.window, self.amount(self.prompt_tokens))))
            safe, rest, n = safe + best[:first], best[first:], n - first
            self.note(best, values, first)
            values = {p: (values[p] / self.policy.window + 1e-4) * float(self.norms[head, p]) for p in rest}
            best = sorted(rest, key=lambda p: (-values[p], p))
        self.note(best, values, n)
        return [*safe, *best[:n]]

    def note(self, best, values, n):
        if 0 < n < len(best):
            above, below = values[best[n - 1]], values[best[n]]
            if above != below:
                self.gap = min(self.gap, (above - below) / above)


def exact_pyramid(entries, layers, beta):
    """Largest remainders, in fractions."""
    low = Fraction(entries, beta)
    high = 2 * entries - low
    shares = [high - (high - low) * Fraction(i, layers - 1) for i in range(layers)]
    found = [x.__floor__() for x in shares]
    while sum(found) < entries * layers:
        i = max(range(layers), key=lambda i: (shares[i] - found[i], -i))
        found[i] += 1
    return found


def read(model, ids, steps):
    """Forward by forward: (logits [T, vocabulary], tokens seen -> layer -> head -> positions)."""
    cache, out, log = kvcache.KVCache(model), [], {}
    with torch.no_grad():
        for now in steps:
            out.append(model(ids[:, now.start : now.stop], past_key_values=cache).logits[0])
            log[now.stop] = kept(cache)
    return torch.cat(out), log


def agrees(model, policy, ids, steps, logits=None, log=None):
    if log is None:
        logits, log = read(kvcache.wrap(model, policy), ids, steps)
        kvcache.unwrap(model)
    oracle = WindowOracle(policy, steps, model)
    expected = dense_logits(model, ids, oracle)
    assert oracle.gap > 1e-5, "choose other tokens"
    for stop, found in log.items():
        assert found == [oracle.kept[i, stop] for i in range(LAYERS)], stop
    assert (logits - expected).abs().max() < 5e-5
    return oracle


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mqa", "llama-mha", "qwen3"])
@pytest.mark.parametrize("name", RULES)
def test_a_conversation_keeps_what_the_rule_says(name, kind, backend):
    policy = RULES[name]
    oracle = agrees(build(kind), policy, prompt(62, seed=3), CHAT)
    heads = [{tuple(h) for h in oracle.kept[i, 62]} for i in range(LAYERS)]
    if isinstance(policy, TOVA):  # one decision for the layer
        assert all(len(x) == 1 for x in heads)
    elif kind != "llama-mqa":
        assert any(len(x) > 1 for x in heads)
    counts = {len(h) for i in range(LAYERS) for h in oracle.kept[i, PROMPT]}
    assert (len(counts) > 1) == (name in ("pyramidkv",) or (name in ("adakv", "adakv-evict") and kind != "llama-mqa"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_padded_batch_observe_with_their_own_last_queries(name, side, backend):
    policy, lengths = RULES[name], (PROMPT, 23, 9)
    rows = [prompt(n + 6, seed=30 + n) for n in lengths]
    ids, mask = padded([row[0, :n] for row, n in zip(rows, lengths)], side)
    later = torch.cat([row[:, n:] for row, n in zip(rows, lengths)])
    real = torch.cat([mask, torch.ones_like(later)], 1)
    model = kvcache.wrap(build("llama-gqa"), policy)
    batch = run(model, torch.cat([ids, later], 1), PROMPT, real)
    kvcache.unwrap(model)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        steps = [range(n), *(range(t, t + 1) for t in range(n, n + 6))]
        log = {n + t: batch.log[PROMPT + t][r] for t in range(7)}
        agrees(model, policy, row, steps, batch.logits[r][real[r].bool()], log)


@pytest.mark.parametrize("chunks", [[20, 17, 1, 2], [39, 1], [1, 30, 4, 5], [33, 7]])
@pytest.mark.parametrize("kind", ["llama-gqa", "mistral", "bloom"])
def test_the_window_may_begin_in_an_earlier_chunk(kind, chunks, backend):
    """Window 6: chunks of 1, 2, 4 and 5 queries lie inside it."""
    if kind == "bloom":
        from transformers import BloomConfig, BloomForCausalLM

        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)).eval()
    else:
        model = build(kind)
    kvcache.wrap(model, RULES["snapkv"])
    ids = prompt(46, seed=5)
    once, pieces = run(model, ids, PROMPT), run(model, ids, PROMPT, chunks=chunks)
    assert once.log == pieces.log
    assert (once.logits - pieces.logits).abs().max() < 5e-5


def test_chunks_of_a_padded_second_turn_forget_what_the_first_left():
    """The short row has no query in the first chunk of the turn: what its first turn left must not be added to."""
    model = kvcache.wrap(build("llama-gqa"), SnapKV(9, 6, 1))
    rows = [prompt(46, seed=40 + r) for r in range(2)]
    turn, mask = padded([rows[0][0, 30:40], rows[1][0, 30:33]], "left")
    real = torch.cat([torch.ones(2, 30, dtype=torch.long), mask], 1)

    def scores_of(ids, real, ends):
        cache = kvcache.KVCache(model)
        places = (real.cumsum(1) - 1).clamp(min=0)
        start = 0
        for end in ends:
            if start >= 30:
                cache.engine.prompt_length = 40 if ids.shape[0] == 2 else ids.shape[1]
            with torch.no_grad():
                model(ids[:, start:end], attention_mask=real[:, :end], position_ids=places[:, start:end],
                      past_key_values=cache)  # fmt: skip
            start = end
        return cache

    whole = torch.cat([torch.cat([row[:, :30] for row in rows]), turn], 1)
    batch = scores_of(whole, real, [30, 35, 40])
    alone = scores_of(rows[1][:, :33], torch.ones(1, 33, dtype=torch.long), [30, 33])
    assert kept(batch, 1) == kept(alone)
    for a, b in zip(batch.engine.layers, alone.engine.layers):
        n = int(b.store.counts[0, 0])
        assert (a.store.columns[0][1, :, :n] - b.store.columns[0][0, :, :n]).abs().max() < 1e-5


def test_drafts_change_no_score(backend):
    """Assisted decoding: the prompt decides; drafts behind it, accepted or not, are generated tokens."""
    ids = prompt(40, seed=8)
    model = kvcache.wrap(build("llama-gqa"), SnapKV(13, 6, 3))
    expected = greedy(model, ids, new=12)
    drafted = greedy(model, ids, new=12, prompt_lookup_num_tokens=3)
    assert torch.equal(expected.sequences, drafted.sequences)
    assert kept(expected.past_key_values) == kept(drafted.past_key_values)


# -- examples worked by hand ----------------------------------------------------------------------------------------


def query_of(*rows):
    """Queries [1, heads, T, 8]: all but the last ask for nothing in particular; the last gives these probabilities."""
    tokens = len(rows[0]) + 1
    q = torch.zeros(1, len(rows), tokens, 8)
    for h, row in enumerate(rows):
        q[0, h, -1, : len(row)] = torch.tensor(row).log()
        q[0, h, -1, len(row)] = -1e4
    return q


def keys(tokens, heads):
    return torch.cat([unit(i) for i in range(tokens)], 2).expand(1, heads, -1, -1).contiguous()


EXAMPLE = [0.6, 0.3, 0.05, 0.05], [0.3, 0.25, 0.25, 0.2]


def test_adakv_of_the_example(backend):
    """Two heads, four entries in all: .6, .3, .3 and, of two that are equal, the first .25."""
    total, none = torch.tensor([4]), torch.tensor([0])
    assert share_out(torch.tensor([EXAMPLE]), total, none).tolist() == [[2, 2]]
    e = engine(AdaKV(3, 1, 1))
    step(e, query_of(*EXAMPLE), keys(5, 2), keys(5, 2))
    assert [held(e, h) for h in range(2)] == [[0, 1, 4], [0, 1, 4]]


def test_adakv_gives_a_head_what_another_does_not_need_and_frees_its_pages(backend):
    rows = [0.97, 0.01, 0.01, 0.01], [0.3, 0.3, 0.2, 0.2]
    found = {}
    for floor in (0.0, 0.5, 1.0):
        e = engine(AdaKV(3, 1, 1, floor=floor), page_size=1)
        step(e, query_of(*rows), keys(5, 2), keys(5, 2))
        found[floor] = [held(e, h) for h in range(2)]
        (storage,) = e.storages.values()
        assert storage.pool.used == sum(map(len, found[floor])) == 6
    assert found[0.0] == found[0.5] == [[0, 4], [0, 1, 2, 4]]
    assert found[1.0] == [[0, 1, 4], [0, 1, 4]]
    few = torch.tensor([[[0.9, 0.8, 0.7], [0.1, 0.2, 0.3], [0.0, 0.0, -math.inf]]])
    assert share_out(few, torch.tensor([3]), torch.tensor([0])).tolist() == [[3, 0, 0]]
    assert share_out(few, torch.tensor([4]), torch.tensor([1])).tolist() == [[2, 1, 1]]
    assert share_out(few, torch.tensor([9]), torch.tensor([3])).tolist() == [[3, 3, 2]]  # what is there


def test_snapkv_pools_over_neighbours_by_position(backend):
    """.5, .02, .03, .05, .4 become .52, .55, .1, .48, .45, all over 3; or .5, .5, .05, .4, .4 by the largest."""
    row = [0.5, 0.02, 0.03, 0.05, 0.4]
    for policy, expected in (
        (SnapKV(3, 1, 1), [0, 4, 5]),
        (SnapKV(3, 1, 3), [0, 1, 5]),
        (SnapKV(4, 1, 3), [0, 1, 3, 5]),
        (SnapKV(3, 1, 3, pooling="max"), [0, 1, 5]),
    ):
        e = engine(policy)
        step(e, query_of(row), keys(6, 1), keys(6, 1))
        assert held(e) == expected, policy
        step(e, query_of([0.2] * 6)[:, :, -1:], unit(6), unit(6))
        assert held(e) == [*expected, 6]  # what is generated stays
        assert scores(e)[6] == 0.0


def test_pyramidkv_spends_exactly_what_it_has():
    """papers.md, section 9: 32 layers, 512 entries, window 8; rounding the slope down would spend 518 per layer."""
    found = pyramid(504, 32, 20)
    assert sum(found) == 32 * 504
    assert found[0] == 983
    assert found[-1] == 25
    assert list(found) == sorted(found, reverse=True)
    for entries, layers, beta in ((504, 32, 20), (7, 3, 3), (2048, 80, 20), (1, 5, 4), (0, 4, 2), (9, 2, 1), (6, 1, 9)):
        found = pyramid(entries, layers, beta)
        assert sum(found) == layers * entries
        assert min(found) >= 0
        if layers > 1:
            assert list(found) == exact_pyramid(entries, layers, beta)


def test_tova_may_drop_the_first_and_the_newest_token(backend):
    e = engine(TOVA(2))
    step(e, query_of([0.1, 0.2, 0.7], [0.1, 0.6, 0.3]), keys(4, 2), keys(4, 2))
    assert [held(e, h) for h in range(2)] == [[1, 2]] * 2  # means .1, .4, .5 and nothing for the newest
    a = torch.zeros(1, 2, 1, 8)
    a[0, :, 0, [1, 2, 4]] = torch.tensor([0.3, 0.2, 0.5]).log()
    new = unit(4).expand(1, 2, 1, 8).contiguous()
    step(e, a, new, new)
    assert [held(e, h) for h in range(2)] == [[1, 4]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv(keep=32)", "keep must be more than window, which stays in any case; got 32 <= 32"),
        ("snapkv(window=0)", "window must be at least 1"),
        ("snapkv(pool=4)", "pool must be odd.*got 4"),
        ("snapkv(pooling='sum')", "pooling must be 'avg' or 'max', got 'sum'"),
        ("snapkv(generated='drop')", "generated must be 'keep' or 'evict', got 'drop'"),
        ("pyramidkv(beta=0)", "beta must be at least 1"),
        ("adakv(floor=1.5)", r"floor must be a share in \[0, 1\], got 1.5"),
        ("tova(keep=0)", "keep must be at least 1"),
        ("tova(sinks=-1)", "sinks must be at least 0"),
    ],
)
def test_bad_arguments_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        kvcache.parse_policy(text)


def test_one_statistic_per_policy():
    with pytest.raises(TypeError, match="names .*last_attention.*there is one score column"):
        type("_Two", (kvcache.Policy,), {"needs": frozenset({"attention_sums", "last_attention"})})

    class _Blind(kvcache.Policy):
        needs = frozenset({"window_attention"})

        def __str__(self):
            return "blind"

    with pytest.raises(ValueError, match="blind: window_attention needs observed queries, 1 or more, got 0"):
        engine(_Blind())
