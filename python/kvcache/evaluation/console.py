"""The terminal side of the commands: progress that also reads well in a log, and the house's table style."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["MissingExtras", "Ticker", "console", "require_extras", "table", "ticking"]

EXTRAS = ("rich", "matplotlib")


class MissingExtras(RuntimeError):
    """The packages of ``kvcache[demo]`` are not installed."""


def require_extras() -> None:
    """Raise MissingExtras, naming what to install, unless tables and plots can be made."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtras(
            f"this command needs {' and '.join(missing)}; install with\n\n    pip install kvcache[demo]\n"
        )


def console() -> Console:
    """Standard output; where it is no terminal, 100 columns wide and without colour."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 100, highlight=False)


def table(*, narrow: bool = False) -> Table:
    """An empty table in the house's style: no vertical lines; ``narrow`` leaves single spaces between columns."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if narrow else 1),
        collapse_padding=True,
        pad_edge=False,
        header_style="bold",
    )


class Ticker:
    """Progress over a known number of steps, each step belonging to a named phase."""

    def phase(self, text: str) -> None:
        """What is being measured from now on."""

    def tick(self, steps: float = 1.0) -> None:
        """``steps`` of the total are done."""


class _Bar(Ticker):
    def __init__(self, progress: object, task: object) -> None:
        self._progress, self._task = progress, task

    def phase(self, text: str) -> None:
        self._progress.update(self._task, description=text)  # type: ignore[attr-defined]

    def tick(self, steps: float = 1.0) -> None:
        self._progress.advance(self._task, steps)  # type: ignore[attr-defined]


class _Lines(Ticker):
    """One line per phase, for logs and pipes."""

    def __init__(self, out: Console, total: float) -> None:
        self._out, self._total, self._done = out, total, 0.0
        self._text, self._begin = "", time.perf_counter()

    def phase(self, text: str) -> None:
        self.close()
        self._text, self._begin = text, time.perf_counter()

    def tick(self, steps: float = 1.0) -> None:
        self._done += steps

    def close(self) -> None:
        if self._text:
            share = min(self._done / self._total, 1.0)
            spent = time.perf_counter() - self._begin
            self._out.print(f"[{share:4.0%}] {self._text:<48} {spent:6.1f} s", markup=False)
            self._text = ""


@contextmanager
def ticking(out: Console, total: float) -> Iterator[Ticker]:
    """Progress over ``total`` steps: a live bar on a terminal, a line per phase elsewhere."""
    if not out.is_terminal:
        lines = _Lines(out, total)
        yield lines
        lines.close()
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        yield _Bar(progress, progress.add_task("", total=total))
