"""``kvcache eval``: policies at several budgets on tasks, side by side, and what the literature expects of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..policies import parse_policy
from ..wrap import wrap
from . import ruler, tasks
from .console import Ticker, console, require_extras, table, ticking
from .contenders import ALL, BASELINES, BUDGET, DEMO, Contender, contenders, label, scaled
from .examples import Example
from .html import write_html
from .loading import load_model, load_tokenizer
from .measured import Ledger, Measured, claims
from .plots import plot_budgets, plot_bytes, task_title
from .rows import Row, machine, write_report
from .suite import (
    PROTOCOLS,
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

__all__ = ["COMPARED", "SHARES", "Tasks", "measure", "run"]

Found = TypeVar("Found", Answers, Bits)

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
QUICK_SHARES = (1 / 2, 1 / 8)
#: What ``--compare`` means.
COMPARED = {"usual": (*DEMO, *BASELINES), "all": ALL, "none": ("full",)}
BYTE_TASKS = ("passkey", "recall", "turns", "two_hop", "frequent_words", "copy")
#: Without ``--task``.
USUAL = {
    True: ("passkey", "recall", "text"),
    False: ("niah_single_2", "niah_multikey_3", "niah_turns", "vt", "fwe", "text"),
}


@dataclass
class Tasks:
    """Where questions and text for a model come from: byte-level ones for kvcache's own, else text (:mod:`.ruler`)."""

    tokenizer: PreTrainedTokenizerBase
    byte_level: bool
    length: int
    chat: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, chat: bool = False) -> Tasks:
        """For ``model``: byte-level if its tokens are those of the shipped one."""
        said = "#abc:WXYZ;"
        own = model.config.vocab_size == 256 and tokenizer(said)["input_ids"] == tasks.encode(said).tolist()
        return cls(tokenizer, own, length, chat)

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks that there are."""
        return (*(BYTE_TASKS if self.byte_level else ruler.RULER), "text")

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError for a name that there is not."""
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"unknown task {unknown[0]!r} for this model; one of {', '.join(self.names)}")

    def examples(self, task: str, samples: int, seed: int) -> list[Example]:
        """``samples`` questions, the same for the same ``seed``."""
        if self.byte_level:
            return draw_examples(task, self.length, samples, seed)
        return ruler.ruler_examples(task, self.tokenizer, self.length, samples, seed, chat=self.chat)

    def windows(self, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Windows of text, and the bytes of each one's second half (None: one a token)."""
        if self.byte_level:
            return draw_windows(self.length, samples, seed), None
        return ruler.token_windows(self.tokenizer, self.length, samples, seed)

    def read(self, tokens: np.ndarray) -> str:
        """Text of an answer."""
        return tasks.decode(tokens) if self.byte_level else self.tokenizer.decode(tokens, skip_special_tokens=True)


def measure(
    wrapped: PreTrainedModel,
    source: Tasks,
    compared: Sequence[Contender],
    names: Sequence[str],
    *,
    samples: int,
    windows: int,
    protocol: str = "agnostic",
    seeds: Sequence[int] = (0,),
    ledger: Ledger | None = None,
    progress: Ticker = Ticker(),  # noqa: B008 (it has no state)
) -> list[Measured]:
    """Quality and bytes of each contender on the same questions and the same text (no times).

    ``samples`` questions of each task and ``windows`` of text for each of the ``seeds``.
    """
    questions = {(task, s): source.examples(task, samples, s) for task in names if task != "text" for s in seeds}
    text = {s: source.windows(windows, s) for s in seeds} if "text" in names else {}

    def bits(policy: str, seed: int) -> Bits:
        tokens, sizes = text[seed]
        return text_bits(wrapped, policy, tokens, sizes=sizes, tick=progress.tick)

    def answers(policy: str, seed: int, task: str) -> Answers:
        rows = questions[task, seed]
        return generate_answers(wrapped, policy, rows, protocol=protocol, read=source.read, tick=progress.tick)

    def once(how: Callable[..., Found], count: int, policy: str, seed: int, *task: str, **what: Any) -> Found:
        what |= {"policy": policy, "seed": seed, "task": task, "length": source.length, "count": count}
        known: Any = None if ledger is None else ledger.find(**what)
        if known is not None:
            progress.tick(count)
            return known
        measured = how(policy, seed, *task)
        if ledger is not None:
            ledger.add(measured, **what)
        return measured

    found = []
    for c in compared:
        mine = Measured(c)
        for task in names:
            progress.phase(f"{task}, {_title(c)}")
            if task == "text":
                first, *others = [once(bits, windows, c.policy, s) for s in seeds]
                mine.bits = first.joined(others)
            else:
                options = {"protocol": protocol, "chat": source.chat}
                some, *more = [once(answers, samples, c.policy, s, task, **options) for s in seeds]
                mine.answers[task] = some.joined(more)
        found.append(mine)
    return found


def _title(c: Contender) -> str:
    return c.label if c.share == 1.0 else f"{c.label} 1/{round(1 / c.share)}"


def _compared(
    compare: str, policies: Sequence[str], length: int, shares: Sequence[float], layers: int
) -> list[Contender]:
    """The contenders of ``compare`` and ``policies``: a name of one, or a text with ``{budget}``, at every budget."""
    named = [p for p in policies if p in ALL]
    found = contenders(tuple(dict.fromkeys([*COMPARED[compare], *named])), length, tuple(shares), layers)
    for text in (p for p in policies if p not in ALL):
        found += scaled(text, length, tuple(shares)) if BUDGET in text else [Contender(text, text, text, 1.0)]
    return [replace(c, policy=str(parse_policy(c.policy))) for c in found]


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
    seeds: int = 1,
    folder: str | None = None,
    names: Sequence[str] = (),
    compare: str = "usual",
    policies: Sequence[str] = (),
    chat: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    resume: bool = False,
) -> list[Row]:
    """Measure, print, and write ``report.json``, plots and ``report.html`` into ``out``; returns the rows.

    Raises ValueError for a task, a policy or a comparison that there is not, for a length that a task cannot shrink to
    and for ``chat`` without a template, before anything is measured.
    """
    require_extras()
    if compare not in COMPARED:
        raise ValueError(f"compare must be one of {', '.join(COMPARED)}, got {compare!r}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    screen, began = console(), time.perf_counter()
    shares = QUICK_SHARES if quick else SHARES
    samples = samples or (32 if quick else 96)
    windows = windows or (16 if quick else 64)
    for text in policies:
        if text not in ALL:
            parse_policy(text.replace(BUDGET, str(length)))
    plain = load_model(folder, dtype).to(device)
    source = Tasks.of(plain, load_tokenizer(folder), length, chat)
    names = tuple(names) or USUAL[source.byte_level]
    source.check(names)
    wrapped = wrap(share_weights(plain))
    compared = _compared(compare, policies, length, shares, plain.config.num_hidden_layers)
    facts = machine()
    screen.print(
        f"\n[bold]kvcache eval[/] · context {length:,} tokens, {samples} questions per task, {windows} windows of "
        f"text, {seeds} seed{'s' if seeds > 1 else ''}, protocol {protocol}, {facts['backend']} kernels "
        f"({facts['isa']}), {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}\n"
    )
    depends = {
        "model": str(folder or "shipped"), "parameters": sum(p.numel() for p in plain.parameters()), "device": device,
        "dtype": str(plain.dtype), "torch": facts["torch"], "transformers": facts["transformers"],
    }  # fmt: skip
    ledger = Ledger(out / "measured.jsonl", depends, resume=resume)
    if resume:
        screen.print(f"Going on with {len(ledger)} results of {ledger.path}", markup=False)
    ticks = seeds * sum(windows if name == "text" else samples for name in names)
    with ticking(screen, len(compared) * ticks + samples) as progress:
        found = measure(
            wrapped, source, compared, names, samples=samples, windows=windows, protocol=protocol,
            seeds=range(seed, seed + seeds), ledger=ledger, progress=progress,
        )  # fmt: skip
        progress.phase("decode time, all side by side")
        context = source.windows(1, seed)[0][0]
        times = decode_times(plain, wrapped, [c.policy for c in compared], context, rounds=7)
        progress.tick(samples)
    full = next(m for m in found if m.contender.name == "full")
    for m in found:
        m.time = times[m.contender.policy]
    rows = [row for m in found for row in m.rows(length, protocol, full)]
    for row in rows:
        row.extra |= {"seed": seed, "seeds": seeds, **{k: v for k, v in facts.items() if k != "backend"}}
    for task in names:
        _show_task(screen, task, rows, shares)
    _show_cost(screen, [r for r in rows if r.task == names[0]], times["DynamicCache"])
    made = claims(found)
    for claim in made:
        mark, colour = ("✓", "green") if claim.holds else ("✗", "red")
        doubt = "" if claim.certain else "; may be chance"
        screen.print(f"[{colour}]{mark}[/] {claim.text} [dim]({claim.measured}, budget 1/8{doubt})[/]")
    written = [
        write_report(out, rows),
        plot_budgets(rows, out / "eval.png"),
        plot_bytes(rows, out / "bytes.png"),
    ]
    written.append(write_html(out / "report.html", rows, made, [p for p in written if p.suffix == ".png"]))
    spent = time.perf_counter() - began
    screen.print(f"\nTook {spent:.0f} s. Written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    return rows


def _show_task(screen: Console, task: str, rows: Sequence[Row], shares: Sequence[float]) -> None:
    """One table: policies down, budgets across."""
    mine = [r for r in rows if r.task == task]
    kind = "bits per byte (lower is better)" if task == "text" else "answers right (95 % interval)"
    screen.print(f"[bold]{task_title(task)}, {kind}[/]")
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
    """What each policy costs, on the first task: bytes held, entries read, decode time."""
    screen.print("[bold]Cost behind the context, one sequence[/]")
    grid = table()
    grid.add_column("Policy")
    for head in ("held\n% of full", "entries\nread/step", "decode\nms/token", "ratio to\nDynamic"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_row("[dim]DynamicCache, unwrapped[/]", "[dim]100%[/]", "", f"[dim]{base.ms:.2f}[/]", "[dim]1.00[/]")
    for r in rows:
        grid.add_row(
            r.policy,
            f"{(r.nbytes or 0) / (r.full_nbytes or 1):.0%}",
            f"{r.read:.0f}",
            f"{r.ms_per_token:.2f}",
            f"{r.ratio:.2f}",
        )
    screen.print(grid)
