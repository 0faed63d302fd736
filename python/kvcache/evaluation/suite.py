"""Measures one policy on one task: accuracy or bits per byte, bytes really held, milliseconds per token.

Two protocols for questions about a context. *Agnostic*: the cache is compressed to the policy's budget before the
question is seen, the hard and honest case of a cache that serves many questions. *Aware*: the question, but for its
last token, is part of what is compressed. Both then generate greedily. Further turns go on with the same cache, which
is compressed again, as a prompt is, when each question has been read. Text is decoded token by token through the cache,
each one given as it is, so that eviction happens at every step.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..attention import CACHE
from ..cache import KVCache
from .examples import Example
from .tasks import Corpus, TaskGenerator, decode

__all__ = [
    "PROTOCOLS",
    "Answers",
    "Bits",
    "Timing",
    "decode_times",
    "draw_examples",
    "draw_windows",
    "generate_answers",
    "share_weights",
    "text_bits",
    "wilson",
]

PROTOCOLS = ("agnostic", "aware")
#: Rows that go through the model together: enough to use the machine, few enough for a laptop's memory.
BATCH = 16

Tick = Callable[[float], object]
ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def wilson(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % for the default ``z``); (0, 1) without samples."""
    if total == 0:
        return 0.0, 1.0
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Held:
    """What caches held, per sequence, at the end of the measured part: sums over ``sequences``."""

    sequences: int = 0
    total_nbytes: int = 0
    total_full_nbytes: int = 0
    total_read: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(self, cache: KVCache, rows: int) -> None:
        self.sequences += rows
        self.total_nbytes += cache.nbytes
        self.total_full_nbytes += cache.full_nbytes
        self.total_read += rows * entries_read(cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, mean per sequence."""
        return round(self.total_nbytes / max(self.sequences, 1))

    @property
    def full_nbytes(self) -> int:
        """Bytes of a dense cache after the same tokens, mean per sequence."""
        return round(self.total_full_nbytes / max(self.sequences, 1))

    @property
    def read(self) -> float:
        """Entries that attention reads per step, mean over layers, kv heads and sequences."""
        return self.total_read / max(self.sequences, 1)


def entries_read(cache: KVCache) -> float:
    """Entries that the last step's attention could read, mean over layers, rows and kv heads."""
    read = []
    for layer in cache.engine.layers:
        counts = layer.state.get("counts") if cache.policy.selects else None
        kept = cache.kept(layer.index)
        read.append(float((counts if isinstance(counts, Tensor) else kept).float().mean()) if kept.numel() else 0.0)
    return statistics.fmean(read)


# -- questions ------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Generated answers, int64, a list for each example with one a turn; ``scores`` float64 ``[examples, turns]``: how
    much of each is right, 0 to 1 (:meth:`Example.score`)."""

    tokens: list[list[np.ndarray]]
    scores: np.ndarray
    held: Held

    @property
    def accuracy(self) -> float:
        """Mean score of all answers."""
        return float(self.scores.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`accuracy`, as if every answer were right or wrong: scores between vary less. Turns of
        one example are no independent samples, so that only examples count."""
        return wilson(self.accuracy * len(self.scores), len(self.scores))

    def joined(self, others: Sequence[Answers]) -> Answers:
        """These answers and ``others``, to other questions of the task, as one."""
        every = (self, *others)
        tokens = [said for a in every for said in a.tokens]
        return Answers(tokens, np.concatenate([a.scores for a in every]), sum((a.held for a in others), self.held))

    def flips(self, full: Answers) -> tuple[int, int]:
        """Answers to the same questions that are (worse, better) than those of the ``full`` cache."""
        return int((self.scores < full.scores).sum()), int((self.scores > full.scores).sum())


def draw_examples(task: str, length: int, samples: int, seed: int = 0) -> list[Example]:
    """``samples`` held-out examples of ``task`` with prompts of ``length`` tokens, the same for the same ``seed``."""
    generator = TaskGenerator((seed, sum(task.encode()), length), split="held_out")
    return [generator.example(task, length) for _ in range(samples)]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    policy: str,
    examples: Sequence[Example],
    *,
    protocol: str = "agnostic",
    batch: int = BATCH,
    read: Callable[[np.ndarray], str] = decode,
    tick: Tick | None = None,
) -> Answers:
    """Answers of a wrapped ``model`` under ``policy``; ``held`` is what the cache holds when the context is compressed.

    ``batch``: examples of one shape that go through the model together. ``read`` makes text of tokens. ``tick`` is
    called with the number of examples after every batch.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    answers: list[list[np.ndarray]] = [[] for _ in examples]
    held = Held()
    for rows in _batches(examples, batch):
        some = [examples[i] for i in rows]
        prompts = _stacked([e.prompt for e in some], model)
        context = some[0].question_start if protocol == "agnostic" else prompts.shape[1] - 1
        context = min(context, prompts.shape[1] - 1)  # generate() needs a token to go on from
        cache = KVCache(model, policy)
        model(prompts[:, :context], **{CACHE: cache}, logits_to_keep=1)
        held.add(cache, len(rows))
        for turn in range(len(some[0].turns)):
            if turn:
                prompts = torch.cat([prompts, _stacked([e.turns[turn].prompt for e in some], model)], 1)
            new = some[0].turns[turn].new_tokens
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),  # else generate() guesses one; every column is real
                **{CACHE: cache},
                max_new_tokens=new,
                min_new_tokens=None if some[0].references else new,
                pad_token_id=_padding(model),
                do_sample=False,
            )
            for i, said in zip(rows, out[:, prompts.shape[1] :].cpu().numpy()):
                answers[i].append(said)
            prompts = out
        if tick is not None:
            tick(len(rows))
    scores = [[t.score(x, read(x)) for t, x in zip(e.turns, said)] for e, said in zip(examples, answers)]
    return Answers(answers, np.array(scores), held)


def _stacked(rows: list[np.ndarray], model: PreTrainedModel) -> Tensor:
    return torch.from_numpy(np.stack(rows)).to(model.device)


def _padding(model: PreTrainedModel) -> int | None:
    """What fills rows that end early; generate() would warn that it takes this itself."""
    settings = model.generation_config
    eos = settings.eos_token_id
    first = eos[0] if isinstance(eos, list) else eos
    return first if settings.pad_token_id is None else settings.pad_token_id


def _batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices of examples in order, at most ``size`` together, all of one shape."""
    groups: dict[Hashable, list[int]] = {}
    for i, e in enumerate(examples):
        # Rows that end a turn early would go into the next one with padding behind their answer.
        groups.setdefault(i if e.references and e.later else e.shape, []).append(i)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


# -- text -----------------------------------------------------------------------------------------------------------


@dataclass
class Bits:
    """Bits per byte of every window, float64 ``[windows]``, and what the cache held at the end."""

    windows: np.ndarray
    held: Held

    def joined(self, others: Sequence[Bits]) -> Bits:
        """These windows and those of ``others`` as one."""
        windows = np.concatenate([self.windows, *(b.windows for b in others)])
        return Bits(windows, sum((b.held for b in others), self.held))

    @property
    def mean(self) -> float:
        return float(self.windows.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean over windows (normal approximation)."""
        half = 1.96 * float(self.windows.std(ddof=1)) / math.sqrt(len(self.windows)) if len(self.windows) > 1 else 0.0
        return self.mean - half, self.mean + half


def draw_windows(length: int, samples: int, seed: int = 0) -> np.ndarray:
    """``samples`` different held-out windows of running text, int64 ``[samples, length]``, BOS first."""
    windows = Corpus.build().windows(length)
    order = np.random.default_rng((seed, length)).permutation(len(windows))
    return windows[order[:samples]]


@torch.inference_mode()
def text_bits(
    model: PreTrainedModel,
    policy: str,
    windows: np.ndarray,
    *,
    prefix: int | None = None,
    sizes: np.ndarray | None = None,
    batch: int = BATCH,
    tick: Tick | None = None,
) -> Bits:
    """Bits per byte of the tokens behind ``prefix`` (default: half the window), each predicted from the cache.

    ``windows`` int64 ``[windows, length]``; ``sizes`` ``[windows]``: bytes behind the prefix (default: one a token).
    The prefix is one prompt; then every token is one decode step. ``tick`` is called with the windows, or parts of
    them, that are done.
    """
    length = windows.shape[1]
    prefix = length // 2 if prefix is None else prefix
    bits, held = [], Held()
    for start in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[start : start + batch]).to(model.device)
        cache = KVCache(model, policy)
        logits = model(tokens[:, :prefix], **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        loss = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        for i in range(prefix, length):
            loss += F.cross_entropy(logits.float(), tokens[:, i], reduction="none").double()
            if i + 1 < length:
                logits = model(tokens[:, i : i + 1], **{CACHE: cache}).logits[:, -1]
            if tick is not None and (i - prefix) % 64 == 63:
                tick(len(tokens) * 64 / (length - prefix))
        held.add(cache, len(tokens))
        size = length - prefix if sizes is None else sizes[start : start + batch]
        bits.append((loss / math.log(2)).cpu().numpy() / size)
    return Bits(np.concatenate(bits), held)


# -- time -----------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Decode time of one contender: median ``ms`` per token and ``ratio`` to ``DynamicCache``, median over rounds."""

    ms: float
    ratio: float
    steps: int
    rounds: list[float] = field(default_factory=list)


def share_weights(model: ModelT) -> ModelT:
    """A second model over the same parameter tensors, so that one can be wrapped and the other not."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


@torch.inference_mode()
def decode_times(
    plain: PreTrainedModel,
    wrapped: PreTrainedModel,
    policies: Sequence[str],
    context: np.ndarray,
    *,
    rounds: int = 9,
    steps: int = 8,
    tick: Tick | None = None,
) -> dict[str, Timing]:
    """Decode time per policy behind ``context`` int64 ``[length]``, batch 1, with ``DynamicCache`` under that name.

    Every contender's cache is filled once. Then, in each round and in rotating order, each decodes ``steps`` tokens;
    what one round of a contender took is compared with the same round of ``plain`` and ``DynamicCache``. Medians over
    rounds, so that a disturbance on the machine hits single rounds and not single contenders; one thread is timed by
    its processor time, which other processes disturb less.
    """
    tokens = torch.from_numpy(context)[None].to(plain.device)
    contenders: list[tuple[str, PreTrainedModel, DynamicCache | KVCache]] = [
        ("DynamicCache", plain, DynamicCache(config=plain.config)),
        *((p, wrapped, KVCache(wrapped, p)) for p in policies),
    ]
    for _, model, cache in contenders:
        model(tokens, **{CACHE: cache}, logits_to_keep=1)
    token = tokens[:, -1:]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
    for r in range(rounds + 1):
        for name, model, cache in contenders[r % len(contenders) :] + contenders[: r % len(contenders)]:
            times = []
            for _ in range(steps):
                begin = clock()
                model(token, **{CACHE: cache})
                times.append(clock() - begin)
            if r:  # the first round warms up
                spent[name].append(statistics.median(times) * 1e3)
        if tick is not None:
            tick(1)
    base = spent["DynamicCache"]
    return {
        name: Timing(statistics.median(ms), statistics.median(a / b for a, b in zip(ms, base)), rounds * steps, ms)
        for name, ms in spent.items()
    }
