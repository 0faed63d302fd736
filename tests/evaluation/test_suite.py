"""The measuring itself: statistics, bytes, protocols and determinism, on the shipped model with few samples."""

import json

import numpy as np
import pytest
import torch

import kvcache
from kvcache.evaluation.contenders import ALL, DEMO, contender, contenders, scaled
from kvcache.evaluation.loading import load_model, load_tokenizer
from kvcache.evaluation.rows import Row, write_report
from kvcache.evaluation.suite import (
    decode_times,
    draw_examples,
    draw_windows,
    generate_answers,
    share_weights,
    text_bits,
    wilson,
)
from kvcache.evaluation.tasks import decode

LENGTH = 192


@pytest.fixture(scope="module")
def plain():
    return load_model()


@pytest.fixture(scope="module")
def wrapped(plain):
    return kvcache.wrap(share_weights(plain))


def test_wilson_against_known_values():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("share", [1 / 2, 1 / 16])
def test_contenders_are_policies_within_their_budget(name, share):
    c = contender(name, 1024, share, 4)
    policy = kvcache.parse_policy(c.policy)
    policy.check(4)
    if name == "tokenselect":
        assert policy.k + policy.sinks + policy.local == 1024 * share
        assert policy.chunk <= policy.local
    elif name == "h2o":
        assert policy.heavy + policy.recent == 1024 * share
    elif name in ("streamingllm", "window", "emasink"):
        assert policy.sinks + policy.window == 1024 * share
    elif name in ("cam", "d2o", "kvmerger"):
        assert policy.heavy + policy.recent == 1024 * share
    elif name in ("promptdistill", "gemfilter"):
        assert policy.keep + 1 == 1024 * share
    elif name == "quest":
        assert policy.k == 1024 * share
    elif name == "streamingcache":
        assert policy.parts[0].sinks + policy.parts[0].window == 1024 * share
    elif name not in ("full", "skipdecode", "tokenselect"):
        assert policy.budget == 1024 * share
        assert policy.generated == "evict"


def test_what_has_no_budget_is_measured_once():
    names = [c.name for c in contenders(DEMO, 1024, (1 / 2, 1 / 8), 4)]
    assert names.count("full") == names.count("skipdecode") == 1
    assert names.count("h2o") == 2
    with pytest.raises(ValueError, match="unknown contender 'h3o'"):
        contender("h3o", 1024, 0.5, 4)


def test_a_budget_in_a_text_is_filled_in():
    found = scaled("tova(keep={budget}) | cachepositions", 1024, (1 / 2, 1 / 8))
    assert [c.policy for c in found] == ["tova(keep=512) | cachepositions", "tova(keep=128) | cachepositions"]
    assert [c.share for c in found] == [1 / 2, 1 / 8]
    assert len({c.name for c in found}) == 1


def test_the_tokenizer_reads_and_writes_what_the_tasks_do():
    tokenizer = load_tokenizer()
    example = draw_examples("passkey", LENGTH, 1)[0]
    assert tokenizer(decode(example.prompt[1:]))["input_ids"] == example.prompt.tolist()
    assert tokenizer.decode(example.answer) == decode(example.answer)


def test_samples_depend_on_the_seed_alone():
    first, again, other = (draw_examples("recall", LENGTH, 3, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(first, again))
    assert not np.array_equal(first[0].prompt, other[0].prompt)
    assert np.array_equal(draw_windows(LENGTH, 4, 1), draw_windows(LENGTH, 4, 1))
    assert len({w.tobytes() for w in draw_windows(LENGTH, 16)}) == 16


def test_full_answers_are_those_of_the_unwrapped_model(plain, wrapped):
    examples = draw_examples("passkey", LENGTH, 4)
    got = generate_answers(wrapped, "full", examples, batch=2)
    prompts = torch.from_numpy(np.stack([e.prompt for e in examples]))
    want = plain.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert np.array_equal(np.array(got.tokens)[:, 0], want[:, LENGTH:].numpy())
    assert got.scores.tolist() == [[float(np.array_equal(t, e.answer))] for (t,), e in zip(got.tokens, examples)]
    context = examples[0].question_start
    assert got.held.read == context
    config = plain.config
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert got.held.full_nbytes == context * entry
    assert got.held.nbytes == -(-context // 16) * 16 * entry


def test_compressed_caches_hold_their_budget(wrapped):
    examples = draw_examples("passkey", LENGTH, 2)
    h2o = generate_answers(wrapped, "h2o(heavy=16, recent=16)", examples)
    assert h2o.held.read == 32
    assert h2o.held.nbytes == pytest.approx(h2o.held.full_nbytes * 32 / examples[0].question_start, rel=1e-3)
    select = generate_answers(wrapped, "tokenselect(k=20, sinks=4, local=8, chunk=8)", examples)
    assert select.held.nbytes >= select.held.full_nbytes
    assert 32 <= select.held.read <= 33  # the newest token may join a reused selection


def test_the_aware_protocol_compresses_the_question_too(wrapped):
    examples = draw_examples("passkey", LENGTH, 2)
    agnostic, aware = (
        generate_answers(wrapped, "full", examples, protocol=protocol) for protocol in ("agnostic", "aware")
    )
    assert aware.held.read == LENGTH - 1 > agnostic.held.read
    assert np.array_equal(aware.tokens, agnostic.tokens)
    with pytest.raises(ValueError, match="protocol must be one of"):
        generate_answers(wrapped, "full", examples, protocol="clairvoyant")


def test_turns_go_on_with_the_compressed_cache(plain, wrapped):
    """Four questions about one context, each read with the answers before it: as one dense model says them."""
    examples = draw_examples("turns", LENGTH, 3)
    got = generate_answers(wrapped, "full", examples)
    assert got.scores.shape == (3, 4)
    for example, said in zip(examples, got.tokens):
        ids = torch.zeros((1, 0), dtype=torch.int64)
        for turn, answer in zip(example.turns, said):
            ids = torch.cat([ids, torch.from_numpy(turn.prompt)[None]], 1)
            ids = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5)
            assert np.array_equal(ids[0, -5:].numpy(), answer)
    assert decode(examples[0].later[0].prompt)[0] == "?"
    few = generate_answers(wrapped, "streamingllm(sinks=2, window=14)", examples)
    assert few.held.read == 16
    assert few.scores.mean() < got.scores.mean()
    assert sum(few.flips(got)) <= 12
    assert few.flips(got)[0] == int((few.scores < got.scores).sum()) > 0
    assert got.flips(got) == (0, 0)


def test_results_of_several_seeds_are_joined(wrapped):
    parts = [generate_answers(wrapped, "full", draw_examples("passkey", LENGTH, 2, seed)) for seed in (0, 1)]
    both = parts[0].joined(parts[1:])
    assert both.scores.tolist() == parts[0].scores.tolist() + parts[1].scores.tolist()
    assert both.held.sequences == 4
    assert both.held.nbytes == parts[0].held.nbytes
    bits = [text_bits(wrapped, "full", draw_windows(96, 2, seed)) for seed in (0, 1)]
    assert bits[0].joined(bits[1:]).mean == pytest.approx((bits[0].mean + bits[1].mean) / 2)


def test_bits_per_byte_are_those_of_one_dense_forward(plain, wrapped):
    windows = draw_windows(96, 3)
    got = text_bits(wrapped, "full", windows, batch=2)
    tokens = torch.from_numpy(windows)
    with torch.inference_mode():
        logits = plain(tokens).logits[:, 47:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 48:].flatten(), reduction="none")
    want = loss.view(3, 48).double().mean(1).numpy() / np.log(2)
    np.testing.assert_allclose(got.windows, want, rtol=1e-4)
    low, high = got.interval
    assert low < got.mean < high


def test_text_evicts_at_every_step(wrapped):
    bits = text_bits(wrapped, "streamingllm(sinks=4, window=28)", draw_windows(96, 2))
    assert bits.held.read == 32


def test_decode_times_pair_every_policy_with_dynamic_cache(plain, wrapped):
    context = draw_examples("passkey", LENGTH, 1)[0].prompt
    times = decode_times(plain, wrapped, ["full", "h2o(heavy=8, recent=8)"], context, rounds=2, steps=2)
    assert list(times) == ["DynamicCache", "full", "h2o(heavy=8, recent=8)"]
    assert times["DynamicCache"].ratio == 1.0
    assert all(t.ms > 0 and t.ratio > 0 and len(t.rounds) == 2 for t in times.values())


def test_a_shared_model_is_wrapped_alone(plain, wrapped):
    assert plain.config._attn_implementation == "sdpa"
    ours, theirs = dict(plain.named_parameters()), dict(wrapped.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours)


def test_reports_are_lists_of_rows(tmp_path):
    rows = [Row("full", "passkey", accuracy=0.123456789, interval=(0.1, 0.2), nbytes=7), Row("full", "text")]
    rows[0].extra = {"threads": 1}
    path = write_report(tmp_path / "new" / "folder", rows)
    first, second = json.loads(path.read_text())
    assert first["accuracy"] == 0.123457
    assert first["interval"] == [0.1, 0.2]
    assert first["threads"] == 1
    assert {"policy", "task", "backend", "device"} <= set(second)
    assert "accuracy" not in second
