"""The universal oracles: what must hold for every policy and backend, whatever it decides."""

import math
from functools import cache

import pytest
import torch
from support.dense import (
    CompactOracle,
    DistillOracle,
    H2OOracle,
    QuestOracle,
    Replay,
    TokenSelectOracle,
    dense_logits,
)
from support.entries import RULES, EntryOracle
from support.models import build, padded
from support.policies import GENEROUS, LAYERS, POLICIES, example, pairs, part, schedule, usual
from support.runs import kept, own_log, run

import kvcache
from kvcache import H2O, PromptDistill, Quest, TokenSelect

TOLERANCE = 5e-5  # float32; logits reach ±15, and what a policy changes is of the order of 1
PROMPT, TOTAL = 44, 66
TURN = 9  # tokens of a second turn


@cache
def tokens(seed: int = 6, total: int = TOTAL):
    # No token twice: in layer 0 equal tokens have equal unrotated keys, and rounding would break the tie.
    return (torch.randperm(94, generator=torch.Generator().manual_seed(seed))[:total] + 3)[None]


def wrapped(policy, name=None, **options):
    return kvcache.wrap(build(name or usual(policy), num_hidden_layers=LAYERS), policy, **options)


@cache
def dense(name: str = "qwen3", seed: int = 6):
    with torch.no_grad():
        return build(name, num_hidden_layers=LAYERS)(tokens(seed)).logits


def close(a, b, what="", tolerance=TOLERANCE):
    worst = float((a - b).abs().max())
    assert worst <= tolerance, f"{what}: differs by {worst}"


@pytest.mark.parametrize("name", GENEROUS)
def test_o1_a_budget_for_everything_changes_nothing(name, backend):
    result = run(wrapped(GENEROUS[name]), tokens(), PROMPT)
    close(result.logits, dense(usual(GENEROUS[name])))
    assert (result.cache.kept(LAYERS - 1) == TOTAL).all()


@pytest.mark.parametrize("name", POLICIES)
def test_o2_equals_dense_attention_under_the_replayed_mask(name, backend):
    policy = POLICIES[name]
    model = wrapped(policy)
    result = run(model, tokens(), PROMPT)
    kvcache.unwrap(model)
    active = schedule(policy, TOTAL, PROMPT)
    oracle = replay(model, result, policy, active)
    active = active or getattr(oracle, "runs", None)
    read = columns(result.cache)
    close(result.logits[0, read], dense_logits(model, tokens()[:, read], oracle, active), name)
    clear(oracle)
    if name != "full":
        change = (result.logits - dense(usual(policy))).abs().max()
        assert change > 0.5, "the policy decided nothing: the test says nothing"


def clear(oracle):
    """Near ties would make a selection depend on rounding: no fault of the code, but of the tokens chosen here."""
    assert getattr(oracle, "gap", 1.0) > 2e-5, "choose other tokens"


def columns(cache, row=0):
    """The columns that a cache counts as tokens; under a policy that filters prompts, as if nothing else were there."""
    real = cache.engine.real
    return torch.arange(cache.seen_tokens) if real is None else real[row].nonzero()[:, 0]


def replay(model, result, policy, active):
    """The oracle that attends as the run did: from its log, or with a selection of its own."""
    select = part(policy, TokenSelect)
    if select is not None:
        return select_oracle(model, select, active)
    merging = part(policy, tuple(RULES))
    if merging is not None or policy.relocates:
        frequencies = model.model.rotary_emb.inv_freq
        return EntryOracle(own_log(result), PROMPT, merging, frequencies, active, policy.relocates)
    distill = part(policy, PromptDistill)
    if distill is not None:
        return distill_oracle(result, distill)
    quest = part(policy, Quest)
    if quest is not None:
        return QuestOracle(quest.k, quest.dense_layers, PROMPT, result.cache.engine.page_size, active)
    log, more = own_log(result), TOTAL - len(columns(result.cache))
    oracle = Replay({t - more: kept_ for t, kept_ in log.items()})
    if active is not None:  # whoever skips a layer leaves nothing there, also not within the prompt
        for t in range(PROMPT):
            oracle.log[t] = [[[p for p in range(t) if active(i)[p]]] * 2 for i in range(LAYERS)]
    return oracle


def distill_oracle(result, policy):
    stages = zip(*(x if isinstance(x, tuple) else (x,) for x in (policy.layer, policy.keep)))
    counts = [(r, k if isinstance(k, int) else int(k * PROMPT)) for r, k in stages]
    return DistillOracle(own_log(result), counts, policy.pool, PROMPT, TOTAL)


def select_oracle(model, select, active=None):
    values = {n: getattr(select, n) for n in ("k", "sinks", "local", "reuse", "chunk", "vote", "pool")}
    kind = CompactOracle if select.positions == "compact" else TokenSelectOracle
    frequencies = model.model.rotary_emb.inv_freq
    return kind(**values, prompt=PROMPT, active=active, inverse_frequencies=frequencies)


@pytest.mark.parametrize("name", ["h2o", "h2o-max", "h2o-ratio", "h2o-heavy", "h2o|skipdecode"])
def test_o2_h2o_keeps_exactly_what_its_scores_say(name, backend):
    policy = part(POLICIES[name], H2O)
    model = wrapped(POLICIES[name])
    result = run(model, tokens(), PROMPT)
    kvcache.unwrap(model)
    heavy, recent = (int(x * PROMPT) if isinstance(x, float) else x for x in (policy.heavy, policy.recent))
    active = schedule(POLICIES[name], TOTAL, PROMPT)
    oracle = H2OOracle(heavy, recent, PROMPT, policy.group, active)
    close(result.logits[0], dense_logits(model, tokens(), oracle, active))
    for t in range(PROMPT, TOTAL + 1):
        for layer in range(LAYERS):
            # A layer that never ran has no heads to ask.
            assert (result.log[t][0][layer] or [[], []]) == oracle.kept[layer][t - 1], (t, layer)
    if name == "h2o":  # heads decide for themselves
        assert any(len({tuple(h) for h in layer}) > 1 for layer in result.log[TOTAL][0])


@pytest.mark.parametrize("name", POLICIES)
def test_o3_later_tokens_change_nothing_before_them(name, backend):
    policy = POLICIES[name]
    select = part(policy, TokenSelect)
    # A chunk votes together: TokenSelect is causal from chunk to chunk.
    inside = 25 if select is None else 5 * select.prefill_chunk
    if policy.routes:  # the last query of a prompt decides what runs later layers: causal from prompt to prompt
        inside = PROMPT
    first = run(wrapped(policy), tokens(), PROMPT)
    for t in (inside, PROMPT + 8):
        other = tokens().clone()
        other[:, t:] = tokens(seed=7)[:, t:]
        second = run(wrapped(policy), other, PROMPT)
        close(first.logits[:, :t], second.logits[:, :t])
        assert (first.logits[:, t:] - second.logits[:, t:]).abs().max() > 0.1
        assert all(first.log[u] == second.log[u] for u in range(PROMPT, t + 1))


@pytest.mark.parametrize("name", POLICIES)
def test_o4_what_is_evicted_never_returns(name, backend):
    result = run(wrapped(POLICIES[name]), tokens(), PROMPT)
    left_out = TOTAL - len(columns(result.cache))
    for t in range(PROMPT, TOTAL):
        for before, after in zip(result.log[t][0], result.log[t + 1][0]):
            for old, new in zip(before, after):
                assert set(new) <= {*old, t - left_out}
                assert new == sorted(set(new))


@pytest.mark.parametrize("name", POLICIES)
def test_o5_a_prompt_in_chunks_is_the_prompt(name, backend):
    policy = POLICIES[name]
    if policy.routes:  # exempt: nobody knows before the last chunk what earlier ones should have computed
        with pytest.raises(ValueError, match=r"needs the prompt at once.* got 1 of the 44 columns"):
            run(wrapped(policy), tokens(), PROMPT, chunks=[1, PROMPT - 1])
        return
    size = policy.prefill_chunk  # set: the policy declares that its decisions depend on chunks of this size
    chunks = [1, 17, 2, 13, 11] if size is None else [4 * size, size, 2 * size, PROMPT - 7 * size]
    assert sum(chunks) == PROMPT
    once = run(wrapped(policy), tokens(), PROMPT)
    pieces = run(wrapped(policy), tokens(), PROMPT, chunks=chunks)
    close(once.logits, pieces.logits)
    assert once.log == pieces.log


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POLICIES)
def test_o6_a_row_of_a_padded_batch_is_the_row_alone(name, side, backend):
    policy = POLICIES[name]
    model = wrapped(policy)
    lengths = (PROMPT, 31, 12)
    rows = [tokens(seed=6 + i) for i in range(3)]
    ids, mask = padded([row[0, :n] for row, n in zip(rows, lengths)], side)
    later = torch.cat([row[:, n : n + 20] for row, n in zip(rows, lengths)])
    real = torch.cat([mask, torch.ones_like(later)], 1)
    batch = run(model, torch.cat([ids, later], 1), PROMPT, real)
    for r, (row, n) in enumerate(zip(rows, lengths)):
        alone = run(model, row[:, : n + 20], n)
        close(batch.logits[r][real[r].bool()], alone.logits[0], f"row {r}")
        for step in range(21):
            assert batch.log[PROMPT + step][r] == alone.log[n + step][0], (r, step)


@pytest.mark.parametrize("name", POLICIES)
def test_o6_padding_in_the_middle(name, backend):
    """Two turns of a conversation, the first padded on the right, the second on the left."""
    model = wrapped(POLICIES[name])
    lengths, turns = (PROMPT, 23), (3, TURN)
    rows = [tokens(seed=8 + i) for i in range(2)]
    first, first_mask = padded([row[0, :n] for row, n in zip(rows, lengths)], "right")
    turn, turn_mask = padded([row[0, n : n + m] for row, n, m in zip(rows, lengths, turns)], "left")
    later = torch.cat([row[:, n + m : n + m + 6] for row, n, m in zip(rows, lengths, turns)])
    real = torch.cat([first_mask, turn_mask, torch.ones_like(later)], 1)

    def converse(parts, mask):
        cache, out, start = kvcache.KVCache(model), [], 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        for ids in parts:
            end = start + ids.shape[1]
            with torch.no_grad():
                out.append(
                    model(
                        ids,
                        attention_mask=mask[:, :end],
                        position_ids=places[:, start:end],
                        past_key_values=cache,
                    ).logits
                )
            start = end
        return torch.cat(out, 1), cache

    steps = later.split(1, 1)
    logits, cache = converse([first, turn, *steps], real)
    for r, (row, n, m) in enumerate(zip(rows, lengths, turns)):
        parts = [row[:, :n], row[:, n : n + m], *row[:, n + m : n + m + 6].split(1, 1)]
        expected, alone = converse(parts, torch.ones(1, n + m + 6, dtype=torch.long))
        close(logits[r][real[r].bool()], expected[0], f"row {r}")
        assert kept(cache, r) == kept(alone), r


@pytest.mark.parametrize("name", ["llama-mqa", "llama-gqa", "llama-mha"])
@pytest.mark.parametrize(
    "policy",
    [
        *("h2o", "h2o-max", "random", "tova", "snapkv", "adakv", "promptdistill", "quest"),
        *("tokenselect", "tokenselect-compact"),
    ],
)
def test_o7_query_heads_read_their_own_kv_head(policy, name, backend):
    model = wrapped(POLICIES[policy], name)
    result = run(model, tokens(), PROMPT)
    kvcache.unwrap(model)
    oracle = replay(model, result, POLICIES[policy], None)
    close(result.logits[0], dense_logits(model, tokens(), oracle, getattr(oracle, "runs", None)))
    clear(oracle)


@pytest.mark.parametrize("name", POLICIES)
def test_o8_positions_and_what_lies_there(name, backend):
    """``positions`` names the entries: the keys and values in the pages are the model's own at these positions, or what
    the policy has made of them there."""
    policy = POLICIES[name]
    model = wrapped(policy)
    result = run(model, tokens(), PROMPT)
    cache = result.cache
    assert cache.seen_tokens == cache.get_seq_length() == TOTAL
    assert cache.get_mask_sizes(5) == (TOTAL + 5, 0)
    kvcache.unwrap(model)
    active = schedule(policy, TOTAL, PROMPT)
    oracle, entries = replay(model, result, policy, active), {}
    active = active or getattr(oracle, "runs", None)
    attend = oracle.attend

    def record(layer, q, k, v, *more):
        out = attend(layer, q, k, v, *more)
        entries[layer] = oracle.final[layer] if isinstance(oracle, EntryOracle) else (k, v)
        return out

    oracle.attend = record
    dense_logits(model, tokens()[:, columns(cache)], oracle, active)
    for i, layer in enumerate(cache.engine.layers):
        if layer.store is None:
            assert not active(i).any()
            continue
        k, v = entries[i]
        if cache.policy.positions == "compact":
            k = oracle.turn(k, -torch.arange(TOTAL))
        elif cache.policy.relocates:
            k = torch.stack([oracle.turn(head, -torch.arange(TOTAL)) for head in k])
        for h in range(2):
            n = int(layer.store.counts[0, h])
            where = layer.store.positions[0, h, :n].long()
            assert cache.positions(i, 0, h).tolist() == sorted(where.tolist())
            assert (layer.store.gather("keys")[0, h, :n] - k[h, where]).abs().max() < 1e-4
            assert (layer.store.gather("values")[0, h, :n] - v[h, where]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "page_size"), [*((n, 4) for n in POLICIES), ("h2o", 1), ("h2o", 16), ("skipdecode|tokenselect", 1)]
)
def test_o9_bytes_are_what_the_pool_holds(name, page_size, backend):
    policy = POLICIES[name]
    model = wrapped(policy, page_size=page_size)
    result = run(model, tokens(), PROMPT)
    cache = result.cache
    (storage,) = cache.engine.storages.values()
    page_bytes = page_size * 2 * 16 * 4
    pages = sum(math.ceil(int(n) / page_size) for i in range(LAYERS) for n in cache.kept(i).flatten())
    assert storage.pool.used == pages
    assert cache.nbytes == pages * page_bytes == cache.report().nbytes
    assert cache.full_nbytes == LAYERS * 2 * TOTAL * 2 * 16 * 4 == cache.report().full_nbytes
    if policy.retains:
        budget = {"streamingllm": 11, "window": 7, "h2o-heavy": 7, "random": 9, "h2o-ratio": 8 + 6, "lagkv": 15}
        budget |= {
            "lagkv-share": 22,
            "expectedattention-slack": 8,
            "rkv|skipdecode": 13,
            "duoattention": TOTAL,
            "duoattention|skipdecode": TOTAL,
            "promptdistill-stages": 22 + 1,
            "promptdistill-truncate": 20 + 1,
        }
        budget = budget.get(name, 11)
        budget += policy.slack
        # Policies whose budget is that of the prompt alone hold all that follows as well; some spend more on one layer
        # or head than on another.
        more = TOTAL - PROMPT if policy.generated == "keep" else 0
        mean = {"pyramidkv", "adakv", "adakv-evict", "trimkv-global"} & {name}
        ends = [result.log[PROMPT]] if more else result.log.values()
        counts = [[len(h) for layer in log[0] for h in layer] for log in ends]
        assert max(map(sum, counts)) == budget * LAYERS * 2 if mean else max(map(max, counts)) == budget
        assert cache.nbytes <= LAYERS * 2 * (math.ceil((budget + more) / page_size) + bool(mean)) * page_bytes
    pool = storage.pool
    del cache, result, storage  # no cycle keeps the pages: they are free at once, not at some garbage collection
    assert pool.used == 0


@pytest.mark.parametrize("name", POLICIES)
def test_o10_the_same_again(name, backend):
    a, b = (run(wrapped(POLICIES[name]), tokens(), PROMPT) for _ in range(2))
    assert torch.equal(a.logits, b.logits)
    assert a.log == b.log


def test_o10_ties_go_to_the_lowest_position(backend):
    class _Indifferent(kvcache.Policy):
        budget, recent = 8, 3

        def score(self, layer):
            return torch.zeros_like(layer.scores)

        def __str__(self):
            return "indifferent"

    result = run(wrapped(_Indifferent()), tokens(), PROMPT)
    for t in range(PROMPT, TOTAL + 1):
        expected = [*range(5), t - 3, t - 2, t - 1]
        assert all(head == expected for layer in result.log[t][0] for head in layer)


# -- other architectures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt-oss", "gpt2", "opt", "phi3", "deepseek-v3"])
@pytest.mark.parametrize(
    "policy",
    ["h2o", "streamingllm", "h2o-heavy", "knorm", "keydiff-slack", "lagkv", "tova", "snapkv", "adakv-evict"],
)
def test_o2_windows_softcaps_sinks_and_latent_attention(name, policy, backend):
    model = kvcache.wrap(build(name), POLICIES[policy])
    ids = tokens()
    result = run(model, ids, PROMPT)
    kvcache.unwrap(model)
    # Experts and sinks of GPT-OSS amplify rounding: two dense forwards differ by 5e-5 already.
    tolerance = 3e-4 if name == "gpt-oss" else TOLERANCE
    close(result.logits[0], dense_logits(model, ids, Replay(own_log(result))), name, tolerance)
    for t in range(PROMPT, TOTAL):
        for before, after in zip(result.log[t][0], result.log[t + 1][0]):
            assert all(set(new) <= {*old, t} for old, new in zip(before, after))


LEGAL, ILLEGAL = pairs()


@pytest.mark.parametrize(("a", "b"), ILLEGAL, ids="|".join)
def test_policies_that_decide_the_same_are_refused_with_the_reason(a, b):
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="cannot combine .* (both decide|reads from|says itself|evicts)"):
            example(one) | example(other)


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), LEGAL, ids="|".join)
def test_every_other_pair_does_what_its_parts_do(a, b):
    """O2 and O4, in either order, for all pairs of classes: what is read is what was logged, and budgets hold."""
    policy = example(a) | example(b)
    assert str(policy) == str(kvcache.parse_policy(str(policy)))
    name = next((n for n in map(usual, (example(a), example(b))) if n != "qwen3"), "qwen3")
    model = wrapped(policy, name)
    result, swapped = run(model, tokens(), PROMPT), run(wrapped(example(b) | example(a), name), tokens(), PROMPT)
    close(result.logits, swapped.logits)
    left_out = TOTAL - len(columns(result.cache))
    for t in range(PROMPT, TOTAL):
        for before, after in zip(result.log[t][0], result.log[t + 1][0]):
            assert all(set(new) <= {*old, t - left_out} for old, new in zip(before, after))
    if policy.routes and (policy.relocates or policy.merges):
        return  # no oracle knows both
    kvcache.unwrap(model)
    active = schedule(policy, TOTAL, PROMPT)
    oracle = replay(model, result, policy, active)
    read = columns(result.cache)
    truth = dense_logits(model, tokens()[:, read], oracle, active or getattr(oracle, "runs", None))
    close(result.logits[0, read], truth)
