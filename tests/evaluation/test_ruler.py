"""Tasks as text: structure, sizes that fit, scores; and that a model which knows the answers gets them right."""

import json
import re

import numpy as np
import pytest
from support.models import build

import kvcache
from kvcache.evaluation.evaluate import Tasks
from kvcache.evaluation.examples import Example
from kvcache.evaluation.loading import load_model, load_tokenizer
from kvcache.evaluation.ruler import RULER, fitting_size, ruler_examples, token_windows
from kvcache.evaluation.suite import generate_answers, text_bits

LENGTH = 3000


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def text(tokenizer, example):
    return tokenizer.decode(example.prompt, skip_special_tokens=True)


@pytest.mark.parametrize("task", RULER)
def test_prompts_fill_their_length_and_hold_the_answers(task, tokenizer):
    first, second = ruler_examples(task, tokenizer, LENGTH, 2, seed=3)
    for example in (first, second):
        used = sum(len(turn.prompt) + turn.new_tokens for turn in example.turns)
        assert used <= LENGTH
        assert used > 0.8 * LENGTH
        context = tokenizer.decode(example.prompt[: example.question_start], skip_special_tokens=True)
        for turn in example.turns:
            assert all(reference in context for reference in turn.references)
            said = tokenizer.decode(turn.answer)
            assert turn.score(turn.answer, said.upper()) == 1.0
            assert turn.score(turn.answer, "I do not know") == 0.0
    assert text(tokenizer, first) != text(tokenizer, second)
    again = ruler_examples(task, tokenizer, LENGTH, 1, seed=3)[0]
    assert np.array_equal(again.prompt, first.prompt)
    assert not np.array_equal(ruler_examples(task, tokenizer, LENGTH, 1, seed=4)[0].prompt, first.prompt)


def test_a_part_of_several_references_is_a_part_of_the_score(tokenizer):
    example = ruler_examples("niah_multivalue", tokenizer, LENGTH, 1)[0]
    assert len(example.references) == 4
    assert example.score(example.answer, " ".join(example.references[:3])) == 0.75


def test_variables_are_a_chain(tokenizer):
    example = ruler_examples("vt", tokenizer, LENGTH, 1)[0]
    prompt = text(tokenizer, example)
    value = re.findall(r"have the value (\d+)", prompt)[-1]
    held = {name for name, number in re.findall(r"VAR ([A-Z]{5}) = (\d+)", prompt) if number == value}
    assert len(held) == 1
    for name, source in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", prompt):
        assert source in held  # assigned before it is used
        held.add(name)
    assert held == set(example.references)


def test_common_and_frequent_words_are_counted(tokenizer):
    example = ruler_examples("cwe", tokenizer, 9000, 1)[0]
    listed = text(tokenizer, example).split("\n\n")[-2]
    words = re.findall(r"\d+\. (\S+)", listed)
    counts = {word: words.count(word) for word in set(words)}
    assert {word for word, n in counts.items() if n == max(counts.values())} == set(example.references)
    example = ruler_examples("fwe", tokenizer, LENGTH, 1)[0]
    words = text(tokenizer, example).split("\n\n")[1].split()
    ranked = sorted({w for w in words if w != "..."}, key=words.count, reverse=True)
    assert set(ranked[:3]) == set(example.references)
    assert words.count(ranked[2]) > words.count(ranked[3])


def test_json_pairs(tokenizer):
    example = ruler_examples("kv_retrieval", tokenizer, LENGTH, 1)[0]
    prompt = text(tokenizer, example)
    pairs = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
    (key,) = re.findall(r'The value of "(.*)" is$', prompt)
    assert (pairs[key],) == example.references


@pytest.mark.parametrize("task", RULER)
def test_a_length_that_a_task_cannot_shrink_to_is_an_error(task, tokenizer):
    """It is neither truncated nor tried for ever."""
    with pytest.raises(ValueError, match=f"{task} does not fit length=60: its smallest prompt and answer have"):
        ruler_examples(task, tokenizer, 60, 1)


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'needle'; one of niah_single_1"):
        ruler_examples("needle", tokenizer, LENGTH, 1)
    with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
        ruler_examples("vt", tokenizer, LENGTH, 1, chat=True)
    with pytest.raises(ValueError, match="vt does not grow to length=100"):
        fitting_size("vt", 100, lambda size: 7)


def test_a_chat_template_holds_context_and_question(tokenizer):
    chatty = load_tokenizer()
    chatty.chat_template = (
        "<{{ messages[0].role }}>{{ messages[0].content }}</>{% if add_generation_prompt %}<a>{% endif %}"
    )
    plain, chat = (ruler_examples("niah_turns", t, LENGTH, 1, chat=t is chatty)[0] for t in (tokenizer, chatty))
    said = text(tokenizer, chat)
    assert said.startswith("<user>The text below")
    assert re.search(r"</><a>The secret number of \S+ is$", said)
    assert "\x1f" not in said
    assert chat.prompt[0] != tokenizer.bos_token_id  # the template's business
    assert plain.prompt[0] == tokenizer.bos_token_id
    assert [t.references for t in chat.turns] == [t.references for t in plain.turns]


def test_a_model_of_ones_own_is_asked_in_text(tokenizer):
    """Any model: rows of different lengths, answers that end early, turns; the shipped model has its own tasks."""
    model = kvcache.wrap(build("qwen3", vocab_size=300))
    source = Tasks.of(model, tokenizer, 1600)
    assert not source.byte_level
    assert Tasks.of(load_model(), tokenizer, 1600).byte_level
    with pytest.raises(ValueError, match="unknown task 'recall' for this model; one of niah_single_1"):
        source.check(["recall"])
    examples = source.examples("niah_turns", 2, 0)
    got = generate_answers(model, "streamingllm(sinks=2, window=30)", examples, read=source.read)
    assert got.scores.shape == (2, 4)
    assert got.scores.max() == 0.0  # random weights
    assert got.held.read == 32


def test_windows_of_text_count_bytes(tokenizer):
    windows, sizes = token_windows(tokenizer, 96, 3)
    assert windows.shape == (3, 96)
    assert sizes.tolist() == [48, 48, 48]  # one token a byte
    model = kvcache.wrap(build("qwen3", vocab_size=300))
    one, two = (text_bits(model, "full", windows, sizes=n) for n in (sizes, 2 * sizes))
    np.testing.assert_allclose(one.windows, 2 * two.windows)


def test_an_answer_without_references_is_right_as_a_whole():
    example = Example(np.arange(4), np.array([7, 8]), "any", 4)
    assert example.new_tokens == 2
    assert example.score(np.array([7, 8]), "") == 1.0
    assert example.score(np.array([7, 9]), "") == 0.0
