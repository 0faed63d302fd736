"""Long-context tasks as text, for any model and tokenizer: made by code, from a seed, without a download.

The tasks have the structure, the counts and the scores of RULER (arXiv 2404.06654) and of InfiniteBench's synthetic
part (arXiv 2402.13718), in words of our own; text and vocabulary come from Python's documentation. Numbers therefore
compare policies with each other, and not with what is published for the originals.

=================== ==================================================================== =====================
task                context                                                              answer
=================== ==================================================================== =====================
niah_single_1       one sentence among repeated ones: a word's number                    the number
niah_single_2, _3   the same in running text; a number, a UUID                           the number, the UUID
niah_multikey_1     four such sentences in running text                                  the one asked for
niah_multikey_2, _3 nothing but such sentences; numbers, UUIDs                           the one asked for
niah_multivalue     one word with four numbers in running text                           all four
niah_multiquery     four words in running text                                           the numbers of all four
niah_turns          the same, one question after the other                               one number a turn
vt                  a chain of five variable assignments among repeated sentences        the five names
cwe                 ten words thirty times, others three times                           the ten words
fwe                 words with Zipf's frequencies; the most frequent is noise            the next three
passkey             one five-digit key among repeated sentences                          the key
number_string       a number of ten digits, five of them twice                           the number
kv_retrieval        a JSON object of UUIDs                                               one value
=================== ==================================================================== =====================
"""

from __future__ import annotations

import functools
import json
import math
import re
import string
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from .examples import Example
from .tasks import Corpus, decode

__all__ = ["RULER", "Prompt", "fitting_size", "ruler_examples", "token_windows"]

NOISE = (
    "The harbour is quiet at this hour.",
    "Boats lie side by side and move a little.",
    "A bell rings somewhere behind the wall.",
    "Then nothing happens for a while.",
)
ZETA_2 = math.pi**2 / 6
#: Tokens of room behind a reference answer, for what a model says around it.
ROOM = 8


@dataclass(frozen=True)
class Prompt:
    """A ``context``, then questions about it, one a turn, with what each answer must contain.

    ``new_tokens``: how many an answer may have at least, whatever the tokenizer.
    """

    context: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    new_tokens: int


# -- pieces ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _prose() -> tuple[str, ...]:
    """Lines of running text: Python's documentation, without the lines that are mostly signs."""
    corpus = Corpus.build()
    text = decode(np.concatenate([corpus.held_out, corpus.train]))
    lines = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return tuple(x for x in lines if 40 <= len(x) <= 400 and sum(c.isalpha() or c == " " for c in x) > 0.9 * len(x))


@functools.lru_cache(maxsize=1)
def _vocabulary() -> tuple[str, ...]:
    """Words of four to ten letters that the prose uses more than once."""
    counted = Counter(re.findall(r"\b[a-z]{4,10}\b", " ".join(_prose())))
    return tuple(sorted(word for word, times in counted.items() if times > 1))


def _value(draw: Random, kind: str) -> str:
    if kind == "number":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return "-".join(draw.sample(_vocabulary(), 2))


def _different(draw: Random, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_value(draw, kind)] = None
    return list(found)


def _repeated(size: int) -> list[str]:
    return [" ".join(NOISE)] * size


def _running(draw: Random, size: int) -> list[str]:
    prose = _prose()
    start = draw.randrange(len(prose))
    return [prose[(start + i) % len(prose)] for i in range(size)]


def _hidden(draw: Random, lines: list[str], needles: list[str], *, ordered: bool = False) -> str:
    """``needles`` at random different places among ``lines``."""
    places = sorted(draw.sample(range(len(lines) + 1), min(len(needles), len(lines) + 1)))
    places += [len(lines)] * (len(needles) - len(places))
    if not ordered:
        draw.shuffle(needles)
    for place, needle in zip(reversed(places), reversed(needles)):
        lines.insert(place, needle)
    return "\n".join(lines)


# -- tasks: each draws a prompt of a size, in lines, words or pairs --------------------------------------------------


def _niah(
    draw: Random, size: int, haystack: str, value: str, *, key: str = "word", keys: int = 1, values: int = 1,
    queries: int = 1, turns: bool = False,
) -> Prompt:  # fmt: skip
    """Needles in a haystack: ``keys`` words with ``values`` each, ``queries`` of them asked for."""

    def needle(name: str, secret: str) -> str:
        return f"Note: the secret {value} of {name} is {secret}."

    if haystack == "needles":
        keys = max(size, 1)
    names = _different(draw, key, keys)
    secrets = _different(draw, value, keys * values)
    owned = {name: secrets[i * values : (i + 1) * values] for i, name in enumerate(names)}
    needles = [needle(name, secret) for name, own in owned.items() for secret in own]
    lines = [] if haystack == "needles" else _repeated(size) if haystack == "noise" else _running(draw, size)
    context = (
        f"The text below contains notes about secret {value}s. Remember them: you will be asked.\n\n"
        f"{_hidden(draw, lines, needles)}\n\n"
    )
    asked = draw.sample(names, queries)
    several = values * queries > 1

    def question(names: list[str]) -> tuple[str, tuple[str, ...]]:
        listed = ", ".join(names)
        ask = (
            f"What are all the secret {value}s of {listed}?" if several else f"What is the secret {value} of {listed}?"
        )
        lead = f"The secret {value}s of {listed} are" if several else f"The secret {value} of {listed} is"
        return f"{ask}\n{lead}", tuple(secret for name in names for secret in owned[name])

    if turns:
        several = values > 1
        rest = [(f"\n\n{q}", r) for q, r in (question([name]) for name in asked[1:])]
        return Prompt(context, (question(asked[:1]), *rest), 16)
    return Prompt(context, (question(asked),), 128)


def _variable_tracking(draw: Random, size: int) -> Prompt:
    def chain(letters: int) -> tuple[list[str], list[str], str]:
        names: dict[str, None] = {}
        while len(names) < 5:
            names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
        first, *others = names
        number = str(draw.randint(10_000, 99_999))
        lines = [f"VAR {first} = {number}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, others))]
        return list(names), lines, number

    def asked(number: str) -> str:
        return f"Which variables have the value {number}, directly or through others?\nThe five variables are"

    shown, its_lines, its_number = chain(3)
    names, lines, number = chain(5)
    example = _hidden(draw, _repeated(3), its_lines, ordered=True)
    context = (
        "Variables are assigned in the text. Follow the assignments.\n\n"
        f"{example}\n\n{asked(its_number)} {', '.join(shown)}.\n\n"
        f"{_hidden(draw, _repeated(size), lines, ordered=True)}\n\n"
    )
    return Prompt(context, ((asked(number), tuple(names)),), 30)


def _common_words(draw: Random, size: int) -> Prompt:
    def listed(common: int, often: int, rare: int, seldom: int) -> tuple[str, list[str]]:
        known = _vocabulary()
        words = draw.sample(known, min(common + rare, len(known)))
        words += _different(draw, "word", common + rare - len(words))  # a long list: two words as one
        items = words[:common] * often + words[common:] * seldom
        draw.shuffle(items)
        return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1)), words[:common]

    ask = "Which ten words are most frequent in the list?\nThe ten most frequent words are"
    short = size < 300  # RULER: below about 4,096 tokens
    example, its = listed(10, 6, 10, 1) if short else listed(10, 10, 30, 3)
    text, words = listed(10, 6, size, 1) if short else listed(10, 30, size, 3)
    context = f"Some words of a list come more often than others.\n\n{example}\n\n{ask} {', '.join(its)}.\n\n{text}\n\n"
    return Prompt(context, ((ask, tuple(words)),), 120)


def _frequent_words(draw: Random, size: int) -> Prompt:
    count = max(8, size // 16)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *words]
    items = [w for rank, w in enumerate(ranked, 1) for _ in range(math.floor((size + 40) * rank**-2 / ZETA_2))]
    draw.shuffle(items)
    context = f"The text is in a secret code; dots mean nothing.\n\n{' '.join(items)}\n\n"
    return Prompt(context, (("Which three words are most frequent?\nThe three words are", tuple(ranked[1:4])),), 50)


def _passkey(draw: Random, size: int) -> Prompt:
    key = str(draw.randint(10_000, 99_999))
    hidden = _hidden(draw, _repeated(size), [f"The pass key is {key}. Keep it in mind: {key} is the pass key."])
    return Prompt(f"A pass key is hidden in the text.\n\n{hidden}\n\n", (("The pass key is", (key,)),), 8)


def _number_string(draw: Random, size: int) -> Prompt:
    digits = "".join(str(draw.randint(0, 9)) * 2 for _ in range(5))
    needle = f"The string of digits is {digits}. Keep it in mind: {digits} is the string."
    hidden = _hidden(draw, _repeated(size), [needle])
    question = ("The string of digits is", (digits,))
    return Prompt(f"A string of digits is hidden in the text.\n\n{hidden}\n\n", (question,), 14)


def _kv_retrieval(draw: Random, size: int) -> Prompt:
    pairs = dict(zip(_different(draw, "uuid", size), _different(draw, "uuid", size)))
    key = draw.choice(list(pairs))
    context = f"Find the value that belongs to a key in this JSON object.\n\n{json.dumps(pairs, indent=0)}\n\n"
    return Prompt(context, ((f'The value of "{key}" is', (pairs[key],)),), 50)


def _needles(haystack: str, value: str, **options: object) -> Callable[[Random, int], Prompt]:
    return functools.partial(_niah, haystack=haystack, value=value, **options)  # type: ignore[arg-type]


#: Tasks by name: (draws a prompt of a size, smallest size).
RULER: dict[str, tuple[Callable[[Random, int], Prompt], int]] = {
    "niah_single_1": (_needles("noise", "number"), 1),
    "niah_single_2": (_needles("prose", "number"), 1),
    "niah_single_3": (_needles("prose", "uuid"), 1),
    "niah_multikey_1": (_needles("prose", "number", keys=4), 4),
    "niah_multikey_2": (_needles("needles", "number"), 2),
    "niah_multikey_3": (_needles("needles", "uuid", key="uuid"), 2),
    "niah_multivalue": (_needles("prose", "number", values=4), 4),
    "niah_multiquery": (_needles("prose", "number", keys=4, queries=4), 4),
    "niah_turns": (_needles("prose", "number", keys=4, queries=4, turns=True), 4),
    "vt": (_variable_tracking, 5),
    "cwe": (_common_words, 10),
    "fwe": (_frequent_words, 40),
    "passkey": (_passkey, 1),
    "number_string": (_number_string, 1),
    "kv_retrieval": (_kv_retrieval, 2),
}


# -- to tokens ------------------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # Not verbose: it would warn of texts that are cut afterwards.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _tokenized(prompt: Prompt, task: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Example:
    """``prompt`` as tokens. A chat template puts the context and the first question into one message of the user."""
    context, (first, references) = prompt.context, prompt.questions[0]
    if chat:
        mark = "\x1f"  # a separator that no task uses
        said = [{"role": "user", "content": context + mark + first.split("\n")[0]}]
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        context, question = text.split(mark)
        first = question + first.split("\n", 1)[-1]  # the model goes on with the answer's first words
    head = _ids(tokenizer, context, special=not chat)

    def turn(question: str, references: tuple[str, ...], before: list[int], later: tuple[Example, ...]) -> Example:
        answer = _ids(tokenizer, " " + ", ".join(references), special=False)
        ids = [*before, *_ids(tokenizer, question, special=False)]
        new = max(prompt.new_tokens, len(answer) + ROOM)
        return Example(np.array(ids), np.array(answer), task, len(before), references, new, later)

    later = tuple(turn(question, refs, [], ()) for question, refs in prompt.questions[1:])
    return turn(first, references, head, later)


def _tokens(example: Example) -> int:
    return sum(len(t.prompt) + t.new_tokens for t in example.turns)


def fitting_size(task: str, length: int, tokens: Callable[[int], int], guess: int = 0) -> int:
    """The largest size of ``task`` with ``tokens(size)``, answer included, at most ``length``.

    Near ``guess`` it is found soonest. Raises ValueError if not even the smallest fits: a prompt is never truncated.
    """
    least = RULER[task][1]
    needed = tokens(least)
    if needed > length:
        raise ValueError(
            f"{task} does not fit length={length}: its smallest prompt and answer have {needed} tokens with this "
            "tokenizer"
        )
    low, high = least, max(guess, least + 1)
    step = max(1, high // 16)
    if tokens(high) > length:
        while high - step > least and tokens(high - step) > length:
            high, step = high - step, 2 * step
        low = max(least, high - step)
    else:
        while tokens(high) <= length:
            if high > 64 * length:
                raise ValueError(f"{task} does not grow to length={length}: {tokens(high)} tokens at size {high}")
            low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return low


def ruler_examples(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int = 0, *, chat: bool = False
) -> list[Example]:
    """``samples`` examples of a task of :data:`RULER`, each of at most ``length`` tokens with its answers.

    ``chat``: through the tokenizer's chat template. Raises ValueError for an unknown task, for a length that the task
    cannot shrink to, and for ``chat`` where the tokenizer has no template.
    """
    if task not in RULER:
        raise ValueError(f"unknown task {task!r}; one of {', '.join(RULER)}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True needs a tokenizer with a chat template, and this one has none")
    make, size = RULER[task]

    found = []
    for index in range(samples):

        def example(size: int, seed: str = f"{seed}/{task}/{index}") -> Example:
            return _tokenized(make(Random(seed), size), task, tokenizer, chat)

        size = fitting_size(task, length, lambda n, drawn=example: _tokens(drawn(n)), size)  # type: ignore[misc]
        found.append(example(size))
    return found


def token_windows(
    tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """``samples`` windows of running text, int64 ``[samples, length]``, and the bytes of each one's second half.

    The text is Python's documentation: any model will have seen some of it.
    """
    draw = Random(f"{seed}/text/{length}")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows, sizes = [], []
    for _ in range(samples):
        text = "\n\n".join(_running(draw, 2 + length // 4))  # a line has at least 40 characters
        ids = _ids(tokenizer, text, special=False)[: length - len(begin)]
        half = length // 2 - len(begin)
        sizes.append(len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:half]).encode()))
        rows.append([*begin, *ids])
    return np.array(rows), np.array(sizes)
