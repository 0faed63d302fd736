"""Measures one policy on one task: accuracy or bits per byte, bytes really held, milliseconds per token.

Two protocols for questions about a context. *Agnostic*: the cache is compressed to the policy's budget before the
question is seen, the hard and honest case of a cache that serves many questions. *Aware*: the question, but for its
last byte, is part of what is compressed. Both then generate greedily and count an answer only when every byte is right.
Text is decoded byte by byte through the cache, each byte given as it is, so that eviction happens at every step.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..attention import CACHE
from ..cache import KVCache
from .tasks import Corpus, Example, TaskGenerator

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

Tick = Callable[[], object]
ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
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
    """Generated answers: int64 ``[examples, answer]`` and which are right in every byte: bool ``[examples]``."""

    tokens: np.ndarray
    right: np.ndarray
    held: Held

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), len(self.right))


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
    tick: Tick | None = None,
) -> Answers:
    """Answers of a wrapped ``model`` under ``policy``; ``held`` is what the cache holds when the context is compressed.

    ``tick`` is called after every batch.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    answers, right, held = [], [], Held()
    for rows in _batches(examples, batch):
        prompts = torch.from_numpy(np.stack([e.prompt for e in rows]))
        wanted = np.stack([e.answer for e in rows])
        context = rows[0].question_start if protocol == "agnostic" else prompts.shape[1] - 1
        context = min(context, prompts.shape[1] - 1)  # generate() needs a token to go on from
        cache = KVCache(model, policy)
        model(prompts[:, :context], **{CACHE: cache}, logits_to_keep=1)
        held.add(cache, len(rows))
        # A real attention mask keeps generate() from guessing one; every column is real.
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            **{CACHE: cache},
            max_new_tokens=wanted.shape[1],
            min_new_tokens=wanted.shape[1],
            do_sample=False,
        )
        said = out[:, prompts.shape[1] :].numpy()
        answers.append(said)
        right.append((said == wanted).all(1))
        if tick is not None:
            tick()
    return Answers(np.concatenate(answers), np.concatenate(right), held)


def _batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Examples in order, at most ``size`` together, all of one shape."""
    groups: dict[tuple[int, int, int], list[Example]] = {}
    for e in examples:
        groups.setdefault((len(e.prompt), len(e.answer), e.question_start), []).append(e)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


# -- text -----------------------------------------------------------------------------------------------------------


@dataclass
class Bits:
    """Bits per byte of every window, float64 ``[windows]``, and what the cache held at the end."""

    windows: np.ndarray
    held: Held

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
    batch: int = BATCH,
    tick: Tick | None = None,
) -> Bits:
    """Bits per byte of the bytes behind ``prefix`` (default: half the window), each predicted from the cache.

    ``windows`` int64 ``[windows, length]``. The prefix is one prompt; then every byte is one decode step.
    ``tick`` is called about every 64 steps.
    """
    length = windows.shape[1]
    prefix = length // 2 if prefix is None else prefix
    bits, held = [], Held()
    for start in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[start : start + batch])
        cache = KVCache(model, policy)
        logits = model(tokens[:, :prefix], **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        loss = torch.zeros(len(tokens), dtype=torch.float64)
        for i in range(prefix, length):
            loss += F.cross_entropy(logits.float(), tokens[:, i], reduction="none").double()
            if i + 1 < length:
                logits = model(tokens[:, i : i + 1], **{CACHE: cache}).logits[:, -1]
            if tick is not None and (i - prefix) % 64 == 63:
                tick()
        held.add(cache, len(tokens))
        bits.append((loss / math.log(2) / (length - prefix)).numpy())
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
    tokens = torch.from_numpy(context)[None]
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
            tick()
    base = spent["DynamicCache"]
    return {
        name: Timing(statistics.median(ms), statistics.median(a / b for a, b in zip(ms, base)), rounds * steps, ms)
        for name, ms in spent.items()
    }
