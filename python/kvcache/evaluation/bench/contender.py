"""Contenders: a model with a cache behind a context that generates tokens in rounds, here or in another process."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...attention import CACHE
from ...cache import KVCache
from ...report import human_bytes
from ..suite import entries_read
from .caches import Context, filled
from .limits import allocated_bytes, cache_bytes, entry_bytes, free_memory, step_bytes
from .shapes import Shape
from .timing import Peak, first_token, generate_tokens

__all__ = ["BASELINE", "Contender", "KVPress", "LeftOut", "Ours", "Transformers"]

BASELINE = "DynamicCache + sdpa"


class LeftOut(RuntimeError):
    """A contender that cannot run here, and why; a row of the report says so."""


@dataclass
class Contender(ABC):
    """What its tokens took in each round, in milliseconds of wall and of processor time; and how memory grew."""

    name: str
    context: Context
    wall: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    prefill: tuple[float, float] | None = None  # seconds to the first token: wall, processor
    prefill_peak: int | None = None
    nbytes: int = 0
    peak: int | None = None
    kept: float = 0.0  # entries that a step reads, per row, layer and kv head
    step_nbytes: float = 0.0  # weights and entries that a step reads
    library: str = "transformers"
    extra: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def prepare(self) -> None:
        """Make the cache and fill it. Raises :class:`LeftOut` where that is not possible."""

    @abstractmethod
    def first_token(self) -> None:
        """Read the context's prompt into a cache of its own, once, timed."""

    @abstractmethod
    def round(self, tokens: int) -> None:
        """Generate ``tokens`` timed tokens."""

    @abstractmethod
    def memory_round(self, tokens: int = 4) -> None:
        """An untimed round that finds the peak: what the cache has allocated and how far memory grew on top."""

    def finish(self) -> None:
        """After the last round: note what a step reads."""
        cache = getattr(self, "cache", None)
        if isinstance(cache, KVCache):
            self.kept = entries_read(cache)
            self.extra["decode"] = cache.report().decode  # replayed from a captured graph?
        self.step_nbytes = step_bytes(self.context.model, cache, self.context.rows, self.kept)

    @abstractmethod
    def close(self) -> None:
        """Let go of the cache."""

    def fits(self) -> None:
        """Raises LeftOut if the context's entries do not fit into the memory that is free."""
        need = entry_bytes(self.context.model) * self.context.rows * self.context.length
        have = free_memory(self.context.model.device)
        if need > have:
            raise LeftOut(f"out of memory: {human_bytes(need)} of keys and values, {human_bytes(have)} free")

    def median(self, clock: str) -> float:
        """Milliseconds per token, median over all of them."""
        return statistics.median(t for r in getattr(self, clock) for t in r)

    def ratio(self, base: Contender, clock: str) -> float:
        """Median over rounds of this contender's median against that of ``base`` in the same round."""
        pairs = zip(getattr(self, clock), getattr(base, clock))
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


@dataclass(kw_only=True)
class _Here(Contender):
    """In this process."""

    model: PreTrainedModel
    options: dict[str, Any] = field(default_factory=lambda: {"disable_compile": True})
    cache: Any = None
    sequence: Any = None

    @abstractmethod
    def make(self, room: int) -> Any:
        """An empty cache for ``room`` tokens."""

    def round(self, tokens: int) -> None:
        self.sequence, wall, cpu = generate_tokens(
            self.model, self.sequence, {CACHE: self.cache}, tokens, **self.options
        )
        self.wall.append(wall)
        self.cpu.append(cpu)

    def memory_round(self, tokens: int = 4) -> None:
        with Peak(self.model.device) as peak:
            self.sequence, *_ = generate_tokens(self.model, self.sequence, {CACHE: self.cache}, tokens, **self.options)
        self.nbytes = cache_bytes(self.cache)
        self.peak = allocated_bytes(self.cache) + peak.nbytes

    def first_token(self) -> None:
        with Peak(self.model.device) as peak:
            cache = self.make(self.context.length + 1)
            self.prefill = first_token(self.model, self.context.prompt, {CACHE: cache}, disable_compile=True)
        self.prefill_peak = peak.nbytes

    def close(self) -> None:
        self.cache = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(kw_only=True)
class Transformers(_Here):
    """One of transformers' caches: ``factory(room)`` makes one for ``room`` tokens."""

    factory: Callable[[int], Any]
    room: int = 0

    def make(self, room: int) -> Any:
        return self.factory(room)

    @torch.no_grad()
    def prepare(self) -> None:
        self.fits()
        self.cache, self.sequence = self.context.fill(self.make(self.room)), self.context.sequence
        self.nbytes = cache_bytes(self.cache)

    def round(self, tokens: int) -> None:
        super().round(tokens)
        self.kept = float(self.sequence.shape[1])


@dataclass(kw_only=True)
class Ours(_Here):
    """A wrapped model under ``policy``."""

    policy: str = "full"

    def __post_init__(self) -> None:
        self.library = "kvcache"

    def make(self, room: int) -> KVCache:
        return KVCache(self.model, self.policy)

    def prepare(self) -> None:
        self.fits()
        self.cache, self.sequence = filled(self.model, self.policy, self.context), self.context.sequence
        self.nbytes = self.cache.nbytes


@dataclass(kw_only=True)
class KVPress(Contender):
    """kvpress in a process of its own, with ``python``: it needs transformers < 5.3. Same weights, ids and clock."""

    python: str
    shape: Shape
    weights: Path
    press: str = "SnapKVPress"
    arguments: dict[str, Any] = field(default_factory=dict)
    read: bool = True
    cpu_number: int | None = None
    process: Any = None

    def __post_init__(self) -> None:
        self.library = "kvpress"

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise LeftOut(f"its process ended: {self.errors.read()[-300:].strip() or self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise LeftOut(answer["error"])
        return answer

    def prepare(self) -> None:
        here, model = Path(__file__).resolve().parent, self.context.model
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        try:
            self.process = subprocess.Popen(
                [self.python, str(here / "worker.py"), str(here / "timing.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            )  # fmt: skip
        except OSError as error:
            raise LeftOut(f"{self.python} does not start: {error}") from None
        found = self.ask(
            "load",
            architecture=self.shape.architecture,
            settings=self.shape.settings(model.config.max_position_embeddings),
            weights=str(self.weights),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            threads=torch.get_num_threads(),
            cpu=self.cpu_number,
            press=self.press,
            arguments=self.arguments,
        )
        self.extra["peer_transformers"] = found["transformers"]
        answer = self.ask("fill", prompt=self.context.prompt.tolist(), read=self.read)
        self.kept = answer["kept"]
        self.prefill = None if answer["first_token"] is None else tuple(answer["first_token"])

    def first_token(self) -> None:
        """Nothing: its process has timed it as it read the prompt."""

    def round(self, tokens: int) -> None:
        answer = self.ask("round", tokens=tokens)
        self.wall.append(answer["wall"])
        self.cpu.append(answer["cpu"])
        self.kept = answer["kept"]

    def memory_round(self, tokens: int = 4) -> None:
        answer = self.ask("round", tokens=tokens)
        self.nbytes = answer["nbytes"]
        self.peak = answer["nbytes"] + answer["peak"]

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.errors.close()
            self.process = None
