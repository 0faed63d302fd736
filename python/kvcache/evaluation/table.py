"""``kvcache eval``: every policy at every budget on every task, and the comparisons that the literature makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policies import parse_policy
from ..wrap import wrap
from .console import console, require_extras, table, ticking
from .contenders import BASELINES, DEMO, Contender, contenders, label
from .loading import load_model
from .plots import plot_budgets
from .rows import Row, machine, write_report
from .suite import (
    BATCH,
    Answers,
    Bits,
    Timing,
    decode_times,
    draw_examples,
    draw_windows,
    generate_answers,
    share_weights,
    text_bits,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SHARES", "Claim", "Measured", "claims", "measure", "run"]

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
QUICK_SHARES = (1 / 2, 1 / 8)
QUESTIONS = ("passkey", "recall")


@dataclass
class Measured:
    """One policy on all tasks."""

    contender: Contender
    answers: dict[str, Answers]  # by task
    bits: Bits
    time: Timing | None = None

    def rows(self, length: int, protocol: str) -> list[Row]:
        """Rows of ``report.json``, one a task."""
        c = self.contender
        common: dict[str, Any] = {"name": c.name, "budget": c.share, "length": length}
        if self.time is not None:
            common |= {"ms_per_token": self.time.ms, "ratio": self.time.ratio}
        rows = []
        for task, a in self.answers.items():
            rows.append(
                Row(
                    c.policy,
                    task,
                    accuracy=a.accuracy,
                    interval=a.interval,
                    nbytes=a.held.nbytes,
                    full_nbytes=a.held.full_nbytes,
                    read=a.held.read,
                    samples=len(a.right),
                    protocol=protocol,
                    **common,
                )
            )
        b = self.bits
        rows.append(
            Row(
                c.policy,
                "text",
                bits_per_byte=b.mean,
                interval=b.interval,
                nbytes=b.held.nbytes,
                full_nbytes=b.held.full_nbytes,
                read=b.held.read,
                samples=len(b.windows),
                **common,
            )
        )
        return rows


def measure(
    wrapped: Any,
    compared: Sequence[Contender],
    *,
    length: int,
    samples: int,
    windows: int,
    protocol: str = "agnostic",
    seed: int = 0,
    progress: Any = None,
) -> list[Measured]:
    """Quality and bytes of each contender on the same questions and the same text (no times)."""
    examples = {task: draw_examples(task, length, samples, seed) for task in QUESTIONS}
    text = draw_windows(length, windows, seed)
    tick = None if progress is None else progress.tick
    found = []
    for c in compared:
        answers = {}
        for task in QUESTIONS:
            if progress is not None:
                progress.phase(f"{task}, {_title(c)}")
            answers[task] = generate_answers(wrapped, c.policy, examples[task], protocol=protocol, tick=tick)
        if progress is not None:
            progress.phase(f"text, {_title(c)}")
        found.append(Measured(c, answers, text_bits(wrapped, c.policy, text, tick=tick)))
    return found


def _title(c: Contender) -> str:
    return c.label if c.share == 1.0 else f"{c.label} 1/{round(1 / c.share)}"


# -- the comparisons ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """An expectation from the literature and what was measured; ``certain``: more than chance can explain."""

    text: str
    measured: str
    holds: bool
    certain: bool = True


def claims(found: Sequence[Measured], share: float = 1 / 8) -> list[Claim]:
    """The comparisons at a budget of ``share`` that ``found`` allows.

    Differences in bits per byte are paired: the same windows under both policies, with their 95 % interval.
    """
    by = {m.contender.name: m for m in found if m.contender.share in (share, 1.0)}
    made = []
    if "full" in by and "tokenselect" in by:
        full, ours = by["full"].answers["passkey"].accuracy, by["tokenselect"].answers["passkey"].accuracy
        made.append(
            Claim(
                "passkey: TokenSelect keeps at least 95 % of the full cache's accuracy",
                f"{ours:.1%} of {full:.1%}",
                full > 0 and ours >= 0.95 * full,
            )
        )
    if "streamingllm" in by:
        a = by["streamingllm"].answers["passkey"].accuracy
        made.append(Claim("passkey: StreamingLLM falls below 20 %", f"{a:.1%}", a < 0.2))
    for better, worse, text in (
        ("streamingllm", "window", "text: StreamingLLM is better than a window without sinks"),
        ("h2o", "random", "text: H2O is better than random eviction"),
    ):
        if better in by and worse in by:
            gap = by[worse].bits.windows - by[better].bits.windows
            half = 1.96 * float(gap.std(ddof=1)) / np.sqrt(len(gap)) if len(gap) > 1 else 0.0
            made.append(
                Claim(
                    text,
                    f"{by[better].bits.mean:.3f} against {by[worse].bits.mean:.3f} bits/byte, "
                    f"difference {gap.mean():.3f} ± {half:.3f}",
                    holds=bool(gap.mean() > 0),
                    certain=bool(abs(gap.mean()) > half),
                )
            )
    return made


# -- the command ----------------------------------------------------------------------------------------------------


def run(
    out: Path,
    *,
    quick: bool = False,
    length: int = 1024,
    samples: int | None = None,
    windows: int | None = None,
    protocol: str = "agnostic",
    seed: int = 0,
    folder: str | None = None,
    policies: Sequence[str] = (),
) -> list[Row]:
    """Measure, print, and write ``report.json`` and ``eval.png`` into ``out``; returns the rows."""
    require_extras()
    screen, began = console(), time.perf_counter()
    shares = QUICK_SHARES if quick else SHARES
    samples = samples or (32 if quick else 96)
    windows = windows or (16 if quick else 64)
    plain = load_model(folder)
    wrapped = wrap(share_weights(plain))
    compared = contenders((*DEMO, *BASELINES), length, shares, plain.config.num_hidden_layers)
    compared += [Contender(text, text, str(parse_policy(text)), 1.0) for text in policies]
    facts = machine()
    screen.print(
        f"\n[bold]kvcache eval[/] · context {length:,} tokens, {samples} questions per task, {windows} windows of "
        f"text, protocol {protocol}, {facts['backend']} kernels ({facts['isa']}), {facts['threads']} thread"
        f"{'s' if facts['threads'] > 1 else ''}\n"
    )
    ticks = 2 * -(-samples // BATCH) + -(-windows // BATCH) * (length // 2 // 64)
    with ticking(screen, len(compared) * ticks + 8) as progress:
        found = measure(
            wrapped, compared, length=length, samples=samples, windows=windows, protocol=protocol, seed=seed,
            progress=progress,
        )  # fmt: skip
        progress.phase("decode time, all side by side")
        context = draw_examples("passkey", length, 1, seed)[0].prompt
        times = decode_times(plain, wrapped, [c.policy for c in compared], context, rounds=7)
        progress.tick(8)
    for m in found:
        m.time = times[m.contender.policy]
    rows = [row for m in found for row in m.rows(length, protocol)]
    for row in rows:
        row.extra = {"seed": seed, **{k: v for k, v in facts.items() if k != "backend"}}
    for task in ("passkey", "recall", "text"):
        _show_task(screen, task, rows, shares)
    _show_cost(screen, rows, times["DynamicCache"])
    for claim in claims(found):
        mark, colour = ("✓", "green") if claim.holds else ("✗", "red")
        doubt = "" if claim.certain else "; may be chance"
        screen.print(f"[{colour}]{mark}[/] {claim.text} [dim]({claim.measured}, budget 1/8{doubt})[/]")
    report = write_report(out, rows)
    plot = plot_budgets(rows, out / "eval.png")
    spent = time.perf_counter() - began
    screen.print(f"\nTook {spent:.0f} s. Written: {report} and {plot}", markup=False, soft_wrap=True)
    return rows


_TITLES = {
    "passkey": "Passkey in text, answers right (95 % interval)",
    "recall": "Multi-query recall, answers right (95 % interval)",
    "text": "Running text, bits per byte (lower is better)",
}


def _show_task(screen: Console, task: str, rows: Sequence[Row], shares: Sequence[float]) -> None:
    """One table: policies down, budgets across."""
    mine = [r for r in rows if r.task == task]
    screen.print(f"[bold]{_TITLES[task]}[/]")
    grid = table()
    grid.add_column("Policy")
    for share in shares:
        grid.add_column(f"1/{round(1 / share)}", justify="right", no_wrap=True)
    for name in dict.fromkeys(r.name for r in mine):
        cells = {r.budget: _cell(r) for r in mine if r.name == name}
        values = [cells[1.0], *[""] * (len(shares) - 1)] if 1.0 in cells else [cells.get(s, "") for s in shares]
        grid.add_row(label(name) + (" [dim](no budget)[/]" if 1.0 in cells else ""), *values)
    screen.print(grid)


def _cell(row: Row) -> str:
    if row.accuracy is None:
        return f"{row.bits_per_byte:.3f}"
    low, high = row.interval or (0.0, 1.0)
    return f"{row.accuracy:.0%} [dim]{low * 100:.0f}-{high * 100:.0f}[/]"


def _show_cost(screen: Console, rows: Sequence[Row], base: Timing) -> None:
    """What each policy costs, on the passkey task: bytes held, entries read, decode time."""
    screen.print("[bold]Cost behind the context, one sequence[/]")
    grid = table()
    grid.add_column("Policy")
    for head in ("held\n% of full", "entries\nread/step", "decode\nms/token", "ratio to\nDynamic"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_row("[dim]DynamicCache, unwrapped[/]", "[dim]100%[/]", "", f"[dim]{base.ms:.2f}[/]", "[dim]1.00[/]")
    for r in rows:
        if r.task == "passkey":
            grid.add_row(
                r.policy,
                f"{(r.nbytes or 0) / (r.full_nbytes or 1):.0%}",
                f"{r.read:.0f}",
                f"{r.ms_per_token:.2f}",
                f"{r.ratio:.2f}",
            )
    screen.print(grid)
