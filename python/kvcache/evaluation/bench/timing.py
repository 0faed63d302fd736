"""How a contender is timed. Knows nothing of kvcache: kvpress's process, with another transformers, loads this too.

The time of a token is the distance between two calls of ``generate``'s streamer, so that it holds everything that a
user waits for; ``generate`` hands tokens over on the CPU, which on a GPU waits for the step.
"""

from __future__ import annotations

import contextlib
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

__all__ = ["Clock", "Peak", "first_token", "generate_tokens"]


class Clock(BaseStreamer):
    """Notes when ``generate`` hands over each token: wall time and this thread's processor time, in seconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())

    def end(self) -> None: ...


def generate_tokens(
    model: Any, sequence: Tensor, cache: dict[str, Any], tokens: int, **options: Any
) -> tuple[Tensor, list[float], list[float]]:
    """``tokens`` timed tokens (and two before them, in which ``generate`` sets itself up) behind ``sequence`` [B, n].

    ``cache``: the cache under the name of generate's argument; it holds all of ``sequence`` but the last token.
    Returns the longer sequence and the milliseconds of each timed token: wall time, processor time of this thread.
    """
    clock = Clock()
    with torch.no_grad():
        sequence = model.generate(
            sequence,
            attention_mask=options.pop("attention_mask", torch.ones_like(sequence)),
            max_new_tokens=tokens + 2,
            do_sample=False,
            streamer=clock,
            **cache,
            **options,
        )
    # put() gets the prompt, then every token; the first token's step includes the set-up.
    wall, cpu = ([(b - a) * 1e3 for a, b in pairwise(times[2:])] for times in (clock.wall, clock.cpu))
    return sequence, wall, cpu


def first_token(model: Any, prompt: Tensor, cache: dict[str, Any], **options: Any) -> tuple[float, float]:
    """Seconds from the call of ``generate`` to its first token, wall and this thread's processor time."""
    clock = Clock()
    wall, cpu = time.perf_counter(), time.thread_time()
    with torch.no_grad():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, streamer=clock,
            **cache, **options,
        )  # fmt: skip
    return clock.wall[1] - wall, clock.cpu[1] - cpu


class Peak:
    """Bytes by which memory grows, at its highest, while the block runs: of the process on a CPU, of torch on a GPU.

    0 where the system does not tell (no /proc).
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.nbytes = 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        clear = Path("/proc/self/clear_refs")
        with contextlib.suppress(OSError):
            clear.write_text("5")  # VmHWM starts anew
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.nbytes = max(_resident("VmHWM") - self._before, 0)


def _resident(field: str) -> int:
    """Bytes that /proc/self/status gives for VmRSS or VmHWM; 0 where there is no such file."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
