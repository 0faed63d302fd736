"""Tasks and text for a byte-level model, made by code and from what every CPython carries.

Nothing is downloaded and nothing is stored: the text is Python's own documentation (``pydoc`` topics and the docstrings
of the standard library, plus the licences in ``/usr/share/common-licenses`` where a machine has them), and everything
else is drawn from a seeded generator.  One token is one ASCII byte; 0 is padding, 1 begins a sequence, 2 ends one.

The tasks and what they look like (``~`` stands for running text):

=============== ============================================================== ===========================
task            sequence                                                       answer
=============== ============================================================== ===========================
text            ``~``                                                          the text itself
copy            a random string over and over                                  every byte of the repetition
recall          ``~#abc:WXYZ;~#def:STUV;~?def:STUV;?abc:WXYZ;``                each value, many pairs
passkey         the same with few needles in much text                         each value
two_hop         ``~#def@abc;~#abc:WXYZ;~?def@abc:WXYZ;``                       the key and its value
frequent_words  ``~abc def abc ghi abc !abc.``                                 the most frequent word
=============== ============================================================== ===========================

>>> generator = TaskGenerator(seed=0, split="held_out")
>>> tokens, kinds = generator.passkey(length=1024, needles=8, queries=1)      # one training or scoring sequence
>>> example = generator.example("passkey", length=1024)                       # a prompt and the answer to generate
>>> example.prompt.shape, decode(example.answer)[-1]
((1024,), ';')
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__:
    from .examples import Example
else:  # beside train.py, which may be run as a script
    from examples import Example  # type: ignore[import-not-found,no-redef]

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "TASKS",
    "Corpus",
    "Kind",
    "Sample",
    "TaskGenerator",
    "answer_spans",
    "decode",
    "encode",
]

PAD, BOS, EOS = 0, 1, 2

_LOWER = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
_UPPER = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_ALNUM = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", np.uint8)

_KEY, _VALUE = 3, 4
_NEEDLE = len("#abc:WXYZ;")
_QUERY = len("?abc:WXYZ;")
_ALIAS = len("#def@abc;")
_HOP_QUERY = len("?def@abc:WXYZ;")
_FREQUENT_ANSWER = len("!abc.")

#: Shorter docstrings are mostly signatures; joined together they are not prose.
_MIN_DOCSTRING = 100
#: Shorter paragraphs are headings and phrases that recur by nature.
_MIN_PARAGRAPH = 40
#: One document in this many is held out.
_HELD_OUT_EVERY = 12
#: Fields of a syntax node that hold statements, in the order of the source.
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
_SKIPPED_PACKAGES = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings")


class Kind(IntEnum):
    """What a position of a sequence is to a loss or a score (``kinds[i]`` speaks of ``tokens[i]`` as a target)."""

    IGNORED = 0
    TEXT = 1
    COPY = 2
    RECALL = 3
    PASSKEY = 4
    TWO_HOP = 5
    FREQUENT_WORDS = 6


#: Names of the tasks; each is a method of :class:`TaskGenerator`.
TASKS = ("copy", "recall", "passkey", "two_hop", "frequent_words", "text")


class Sample(NamedTuple):
    """One sequence: ``tokens`` int64 ``[length]`` (BOS first) and ``kinds`` uint8 ``[length]`` (see :class:`Kind`)."""

    tokens: np.ndarray
    kinds: np.ndarray


def encode(text: str, bos: bool = True) -> np.ndarray:
    """ASCII string to token ids, int64 ``[len(text) + bos]``; what is not ASCII becomes ``?``."""
    ids = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
    return np.concatenate([[BOS], ids]) if bos else ids


def decode(tokens: np.ndarray) -> str:
    """Token ids ``[n]`` to a string, the inverse of ``encode(..., bos=False)``."""
    return np.asarray(tokens).astype(np.uint8).tobytes().decode("ascii", "replace")


def answer_spans(kinds: np.ndarray) -> list[slice]:
    """The runs of answer positions in ``kinds`` ``[length]``; every run is one answer."""
    inside = np.concatenate([[False], kinds > Kind.TEXT, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# --- text ---------------------------------------------------------------------------------------------------------


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Qualified name and text of every docstring in a module's source."""
    try:
        stack: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    while stack:
        name, node = stack.pop()
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text:
                yield name, text
        # Of the children, statements alone: expressions, nine nodes in ten, define nothing.
        for child in reversed([x for field in _BLOCKS for x in getattr(node, field, ())]):
            stack.append((f"{name}.{child.name}" if getattr(child, "name", None) else name, child))


def _documents() -> Iterator[tuple[str, str]]:
    """Name and text of every document, in an order that is the same on every machine with the same Python."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield f"topic:{name}", text
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_PACKAGES]  # site-packages can be huge
        modules += [Path(folder, name).relative_to(stdlib).as_posix() for name in files if name.endswith(".py")]
    for module in sorted(modules):
        for name, text in _docstrings((stdlib / module).read_text("utf-8", "replace")):
            if len(text) >= _MIN_DOCSTRING:
                yield f"docstring:{module}:{name}", text
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        if path.is_file() and not path.is_symlink():
            yield f"licence:{path.name}", path.read_text("utf-8", "replace")


def _clean(text: str) -> bytes:
    """ASCII with line breaks and tabs as the only control characters (the low ones are the model's special tokens)."""
    ascii_bytes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    allowed = (ascii_bytes >= 32) & (ascii_bytes < 127) | (ascii_bytes == 9) | (ascii_bytes == 10)
    return ascii_bytes[allowed].tobytes() + b"\n\n"


@dataclass(frozen=True)
class Corpus:
    """Running text in two parts, ``train`` and ``held_out``, each uint8 ``[bytes]``.

    A document is held out by the hash of its *name*, so that an edited topic of another Python version stays on the
    same side.  Documents with equal content count once.  Licences are only trained on: their versions share whole
    paragraphs, which would leak.  Documentation topics share some too; ``novel`` is what is left of ``held_out``
    without the paragraphs that training documents have as well (about a tenth of it).
    """

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    @functools.lru_cache(maxsize=1)
    def build(cls) -> Corpus:
        """Collect the text of this Python (a few seconds; kept for the life of the process)."""
        parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
        seen: set[bytes] = set()
        for name, text in _documents():
            content = _clean(text)
            if content in seen:
                continue
            seen.add(content)
            digest = int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16)
            held_out = digest % _HELD_OUT_EVERY == 0 and not name.startswith("licence:")
            parts["held_out" if held_out else "train"].append(content)
        return cls(**{split: np.frombuffer(b"".join(part), np.uint8) for split, part in parts.items()})

    @functools.cached_property
    def novel(self) -> np.ndarray:
        """``held_out`` without the paragraphs that are also in ``train``, up to white space: uint8 ``[bytes]``."""
        trained = " ".join(decode(self.train).split())
        paragraphs = re.split(r"\n\s*\n", decode(self.held_out))
        kept = (p for p in paragraphs if len(p) < _MIN_PARAGRAPH or " ".join(p.split()) not in trained)
        return np.frombuffer("\n\n".join(kept).encode("ascii"), np.uint8)

    def split(self, name: str) -> np.ndarray:
        """The part called ``name`` (``train``, ``held_out`` or ``novel``), uint8 ``[bytes]``."""
        if name not in ("train", "held_out", "novel"):
            raise ValueError(f"split must be 'train', 'held_out' or 'novel', not {name!r}")
        return getattr(self, name)

    def windows(self, length: int, split: str = "held_out", limit: int | None = None) -> np.ndarray:
        """Adjacent windows that cover a split without overlap: int64 ``[count, length]``, BOS first in each."""
        text = self.split(split)
        count = len(text) // (length - 1)
        if limit is not None:
            count = min(count, limit)
        body = text[: count * (length - 1)].reshape(count, length - 1).astype(np.int64)
        return np.concatenate([np.full((count, 1), BOS), body], axis=1)

    def fingerprint(self) -> str:
        """Short hash of both parts: equal on machines that made the same text."""
        return hashlib.sha256(self.train.tobytes() + b"\0" + self.held_out.tobytes()).hexdigest()[:16]


# --- tasks --------------------------------------------------------------------------------------------------------


class _Question(NamedTuple):
    """A question at a sequence's end: bytes ``[n]``, of which the last ``answer`` are what a model must say."""

    data: np.ndarray
    answer: int


class TaskGenerator:
    """Draws sequences of the tasks, deterministically by ``seed``, with text of one ``split`` of the corpus.

    Every task method takes the sequence's ``length`` in tokens and returns a :class:`Sample` of exactly that length.
    What a method is not told (how many needles, how many questions) it draws, over the range the model is trained on.
    """

    def __init__(self, seed: int | tuple[int, ...] = 0, split: str = "train", corpus: Corpus | None = None) -> None:
        self.split = split
        self._rng = np.random.default_rng(seed)
        self._text = (corpus or Corpus.build()).split(split)

    # the tasks

    def text(self, length: int) -> Sample:
        """A window of running text; every byte of it is of kind TEXT."""
        kinds = np.full(length, Kind.TEXT, np.uint8)
        kinds[0] = Kind.IGNORED
        return self._sample([self._running_text(length - 1)], kinds)

    def copy(self, length: int, period: int | None = None) -> Sample:
        """A random string of ``period`` characters, repeated to the end.

        The first bytes of the first repetition are not asked for: until a few of them are seen, nothing tells where in
        the string they are.
        """
        if period is None:
            period = int(np.exp(self._rng.uniform(np.log(3), np.log(length // 2))))
        repeated = np.tile(self._random(period, _ALNUM), length // period + 1)[: length - 1]
        kinds = np.full(length, Kind.COPY, np.uint8)
        kinds[: period + 4] = Kind.IGNORED
        return self._sample([repeated], kinds)

    def recall(self, length: int, pairs: int | None = None, queries: int | None = None) -> Sample:
        """Multi-query associative recall: as many pairs as fit half the length, all (or ``queries`` of them) asked."""
        most = max(1, (length - 2) // (_NEEDLE + _QUERY))
        pairs = int(self._rng.integers(max(1, most // 2), most + 1)) if pairs is None else pairs
        return self._key_value(length, pairs, pairs if queries is None else queries, Kind.RECALL)

    def passkey(self, length: int, needles: int | None = None, queries: int | None = None) -> Sample:
        """``needles`` passkeys spread over running text and ``queries`` of them asked for at the end."""
        most = max(2, min(12, (length - 2) // (_NEEDLE + _QUERY) * 2 // 3))
        needles = int(self._rng.integers(1, most)) if needles is None else needles
        if queries is None:
            queries = int(self._rng.integers(max(1, needles // 2), needles + 1))
        return self._key_value(length, needles, queries, Kind.PASSKEY)

    def two_hop(self, length: int, variables: int | None = None, queries: int | None = None) -> Sample:
        """Variables that name another variable, which has the value; definitions in any order, in running text."""
        if variables is None:
            most = max(2, min(8, (length - 2) // (_ALIAS + _NEEDLE + _HOP_QUERY)))
            variables = int(self._rng.integers(1, most))
        if queries is None:
            queries = int(self._rng.integers(1, variables + 1))
        names = self._keys(2 * variables)
        aliases, keys = names[:variables], names[variables:]
        values = [self._random(_VALUE, _UPPER) for _ in range(variables)]
        body = [_join(b"#", k, b":", v, b";") for k, v in zip(keys, values, strict=True)]
        body += [_join(b"#", a, b"@", k, b";") for a, k in zip(aliases, keys, strict=True)]
        questions = [
            _Question(_join(b"?", aliases[i], b"@", keys[i], b":", values[i], b";"), _KEY + 1 + _VALUE + 1)
            for i in self._rng.permutation(variables)[:queries]
        ]
        return self._scatter(length, [body[i] for i in self._rng.permutation(len(body))], questions, Kind.TWO_HOP)

    def frequent_words(self, length: int, words: int | None = None) -> Sample:
        """A list of words drawn from few, one more often than every other by two at least; which one, is asked."""
        words = int(self._rng.integers(3, 7)) if words is None else words
        vocabulary = self._keys(words)
        count = (length - 1 - _FREQUENT_ANSWER) // (_KEY + 1)
        weights = np.arange(1, words + 1) ** -1.5
        weights /= weights.sum()
        while True:
            drawn = self._rng.choice(words, count, p=weights)
            often = np.bincount(drawn, minlength=words)
            if often[0] >= often[1:].max() + 2:
                break
        spaced = np.stack([_join(word, b" ") for word in vocabulary])
        listed = spaced[drawn].reshape(-1)
        filler = self._running_text(length - 1 - len(listed) - _FREQUENT_ANSWER)
        kinds = np.full(length, Kind.IGNORED, np.uint8)
        kinds[1 : 1 + len(filler)] = Kind.TEXT
        kinds[-1 - _KEY : -1] = Kind.FREQUENT_WORDS
        return self._sample([filler, listed, _join(b"!", vocabulary[0], b".")], kinds)

    # collections

    def sample(self, task: str, length: int, **options: int) -> Sample:
        """One sequence of the task called ``task`` (one of :data:`TASKS`)."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
        return getattr(self, task)(length, **options)

    def batch(self, size: int, length: int, mix: Mapping[str, float]) -> Sample:
        """``size`` sequences, each of a task drawn by its weight in ``mix``; both arrays are ``[size, length]``."""
        weights = np.array(list(mix.values()), float)
        drawn = self._rng.choice(len(mix), size, p=weights / weights.sum())
        names = list(mix)
        rows = [self.sample(names[i], length) for i in drawn]
        return Sample(np.stack([r.tokens for r in rows]), np.stack([r.kinds for r in rows]))

    def example(self, task: str, length: int, answer_length: int = 64, **options: int) -> Example:
        """A prompt of exactly ``length`` tokens and the answer that belongs after it.

        ``passkey`` hides eight needles and asks for one, ``two_hop`` four variables and asks for one, ``recall`` asks
        for the last of its pairs after all the others, ``turns`` hides eight and asks for four, one a turn; ``options``
        go to the task's method and change that. ``answer_length`` is how many bytes ``text`` and ``copy`` continue.
        """
        if task == "text":
            tokens, _ = self.text(length + answer_length)
            return Example(tokens[:length], tokens[length:], task, length)
        if task == "copy":
            tokens, _ = self.copy(length + answer_length, **{"period": length * 2 // 3, **options})
            return Example(tokens[:length], tokens[length:], task, length)
        if task == "turns":
            return self._turns(length, **options)
        defaults: dict[str, dict[str, int]] = {
            "passkey": {"needles": 8, "queries": 1},
            "two_hop": {"variables": 4, "queries": 1},
        }
        said, asked = {
            "passkey": (_VALUE + 1, _QUERY - _VALUE - 1),
            "recall": (_VALUE + 1, _QUERY - _VALUE - 1),
            "two_hop": (_KEY + 1 + _VALUE + 1, 1 + _KEY + 1),
            "frequent_words": (_KEY + 1, 1),
        }.get(task, (0, 0))
        tokens, _ = self.sample(task, length + said, **{**defaults.get(task, {}), **options})
        answer = tokens[length : length + _KEY] if task == "frequent_words" else tokens[length:]  # not its full stop
        return Example(tokens[:length], answer, task, length - asked)

    def _turns(self, length: int, needles: int = 8, queries: int = 4) -> Example:
        said, asked = _VALUE + 1, _QUERY - _VALUE - 1
        tokens, _ = self._key_value(length + said + (queries - 1) * _QUERY, needles, queries, Kind.PASSKEY)

        def turn(start: int, end: int, later: tuple[Example, ...] = ()) -> Example:
            question = end - asked - start
            return Example(tokens[start:end], tokens[end : end + said], "turns", question, later=later)

        ends = [length + i * _QUERY for i in range(queries)]
        return turn(0, length, tuple(turn(end - asked, end) for end in ends[1:]))

    # pieces

    def _random(self, count: int, alphabet: np.ndarray) -> np.ndarray:
        return alphabet[self._rng.integers(0, len(alphabet), count)]

    def _keys(self, count: int) -> list[np.ndarray]:
        """``count`` different keys of three lower-case letters."""
        base = len(_LOWER)
        numbers = self._rng.choice(base**_KEY, count, replace=False)
        digits = numbers[:, None] // base ** np.arange(_KEY) % base
        return list(_LOWER[digits])

    def _running_text(self, count: int) -> np.ndarray:
        start = int(self._rng.integers(0, len(self._text) - count))
        return self._text[start : start + count]

    def _key_value(self, length: int, pairs: int, queries: int, kind: Kind) -> Sample:
        keys = self._keys(pairs)
        values = [self._random(_VALUE, _UPPER) for _ in range(pairs)]
        body = [_join(b"#", k, b":", v, b";") for k, v in zip(keys, values, strict=True)]
        questions = [
            _Question(_join(b"?", keys[i], b":", values[i], b";"), _VALUE + 1)
            for i in self._rng.permutation(pairs)[:queries]
        ]
        return self._scatter(length, body, questions, kind)

    def _scatter(self, length: int, body: list[np.ndarray], questions: list[_Question], kind: Kind) -> Sample:
        """Spread ``body`` over as much running text as fills ``length``, then put the questions at the end."""
        room = length - 1 - sum(len(b) for b in body) - sum(len(q.data) for q in questions)
        if room < 0:
            raise ValueError(f"{len(body)} definitions and {len(questions)} questions do not fit {length} tokens")
        filler = self._running_text(room)
        cuts = np.sort(self._rng.integers(0, room + 1, len(body)))
        pieces, kinds, last = [], [np.zeros(1, np.uint8)], 0
        for definition, cut in zip(body, cuts, strict=True):
            pieces += [filler[last:cut], definition]
            kinds += [np.full(cut - last, Kind.TEXT, np.uint8), np.zeros(len(definition), np.uint8)]
            last = cut
        pieces.append(filler[last:])
        kinds.append(np.full(room - last, Kind.TEXT, np.uint8))
        for data, answer in questions:
            pieces.append(data)
            asked = np.zeros(len(data), np.uint8)
            asked[len(data) - answer :] = kind
            kinds.append(asked)
        return self._sample(pieces, np.concatenate(kinds))

    @staticmethod
    def _sample(pieces: list[np.ndarray], kinds: np.ndarray) -> Sample:
        return Sample(np.concatenate([[BOS], *pieces]).astype(np.int64), kinds)


def _join(*parts: bytes | np.ndarray) -> np.ndarray:
    """Bytes and arrays of bytes in one uint8 array."""
    return np.concatenate([np.frombuffer(p, np.uint8) if isinstance(p, bytes) else p for p in parts])
