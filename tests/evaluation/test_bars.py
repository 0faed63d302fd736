"""What the shipped model must show, with fixed seeds: the orderings of the literature at 1/8 of 1,024 tokens."""

import pytest

import kvcache
from kvcache.evaluation.contenders import contender
from kvcache.evaluation.loading import load_model
from kvcache.evaluation.measured import Measured, claims
from kvcache.evaluation.suite import draw_examples, draw_windows, generate_answers, text_bits

LENGTH, SAMPLES, WINDOWS = 1024, 32, 16


@pytest.fixture(scope="module")
def model():
    return kvcache.wrap(load_model())


def policy(name):
    return contender(name, LENGTH, 1 / 8, 4).policy


@pytest.fixture(scope="module")
def passkey(model):
    examples = draw_examples("passkey", LENGTH, SAMPLES)
    return {n: generate_answers(model, policy(n), examples) for n in ("full", "tokenselect", "streamingllm")}


@pytest.fixture(scope="module")
def text(model):
    windows = draw_windows(LENGTH, WINDOWS)
    return {
        n: text_bits(model, policy(n), windows, prefix=LENGTH * 3 // 4)
        for n in ("streamingllm", "window", "h2o", "random")
    }


def test_the_model_finds_passkeys(passkey):
    assert passkey["full"].accuracy >= 0.95


def test_tokenselect_keeps_what_streamingllm_loses(passkey):
    assert passkey["tokenselect"].accuracy >= 0.95 * passkey["full"].accuracy
    assert passkey["streamingllm"].accuracy < 0.2


def test_sinks_help_on_text(text):
    assert text["streamingllm"].mean < text["window"].mean


def test_attention_scores_beat_chance_on_text(text):
    assert text["h2o"].mean < text["random"].mean


def test_claims_say_the_same(passkey, text):
    found = [
        Measured(
            contender(n, LENGTH, 1 / 8, 4),
            {"passkey": passkey.get(n, passkey["streamingllm"])},
            text.get(n, text["h2o"]),
        )
        for n in ("full", "tokenselect", "streamingllm", "window", "h2o", "random")
    ]
    made = claims(found)
    assert len(made) == 4
    assert all(claim.holds for claim in made)
