"""What the scripts in bench/end_to_end share: rounds in rotating order, and rows for people and for tables.py."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..rows import machine
from .contender import Contender

__all__ = ["clock_name", "line", "median_ratio", "take_turns", "timed_turns", "write"]


def clock_name() -> str:
    """One thread is timed by its processor time, which other work disturbs less; several by the clock."""
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def take_turns(contenders: Sequence[Contender], rounds: int, tokens: int, *, warm: bool = True) -> None:
    """``rounds`` rounds of ``tokens`` tokens of every contender, in rotating order, after one that is forgotten."""
    for r in range(rounds + warm):
        turn = r % len(contenders)
        for c in [*contenders[turn:], *contenders[:turn]]:
            c.round(tokens)
            if warm and r == 0:
                c.wall, c.cpu = [], []


def timed_turns(
    steps: Sequence[Callable[[], Any]], rounds: int, *, before: Sequence[Callable[[], Any]] = ()
) -> list[list[float]]:
    """Milliseconds of each of ``steps`` per round, in rotating order, after one round that is forgotten.

    ``before``: called, untimed, before each step of the same index.
    """
    clock = time.thread_time if clock_name() == "cpu" else time.perf_counter
    spent: list[list[float]] = [[] for _ in steps]
    for r in range(rounds + 1):
        for i in [(r + k) % len(steps) for k in range(len(steps))]:
            if before:
                before[i]()
            begin = clock()
            steps[i]()
            if r:
                spent[i].append((clock() - begin) * 1e3)
    return spent


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the pairs' ratios a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None)


def write(out: Path | None, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The form that bench/tables.py reads; ``settings`` without paths. Floats keep six digits."""
    if out is None:
        return

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    plain = {k: v for k, v in settings.items() if not isinstance(v, Path) and v is not None and k != "out"}
    body = {
        "machine": machine(),
        "command": " ".join(["python", *(x for x in _relative(sys.argv))]),
        "settings": plain,
        "rows": [{k: short(v) for k, v in row.items()} for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n")


def _relative(arguments: Sequence[str]) -> list[str]:
    here = f"{Path.cwd()}/"
    return [x.removeprefix(here) for x in arguments]
