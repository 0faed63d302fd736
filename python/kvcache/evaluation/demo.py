"""``kvcache demo``: a real language model under five cache policies, side by side, in about a minute.

Everything shown is measured in the run: right and wrong answers, bits per byte, bytes of pages held, decode time.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..report import human_bytes
from ..wrap import wrap
from .console import console, require_extras, table, ticking
from .contenders import DEMO, Contender, contender
from .examples import Example
from .loading import load_model, load_tokenizer
from .measured import Measured
from .rows import Row, machine, write_report
from .suite import (
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
from .tasks import decode

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Results", "run"]

ROUNDS = 9
QUESTIONS = ("passkey", "recall")
#: A round of timing, in questions, for the progress bar.
ROUND_TICKS = 4.0


@dataclass
class Results:
    """What one run measured, by contender's name."""

    contenders: list[Contender]
    answers: dict[tuple[str, str], Answers]  # (task, name)
    bits: dict[str, Bits]
    times: dict[str, Timing]  # by policy text, and "DynamicCache"
    shown: Example
    shown_answers: dict[str, str]
    length: int
    seconds: float = 0.0

    def rows(self) -> list[Row]:
        """Rows of ``report.json``: a policy on a task each, and the baseline's decode time."""
        rows: list[Row] = []
        for c in self.contenders:
            answers = {task: self.answers[task, c.name] for task in QUESTIONS}
            rows += Measured(c, answers, self.bits[c.name], self.times[c.policy]).rows(self.length, "agnostic")
        base = self.times["DynamicCache"]
        held = self.answers["passkey", "full"].held.full_nbytes
        rows.append(
            Row(
                "DynamicCache",
                "decode",
                nbytes=held,
                full_nbytes=held,
                ms_per_token=base.ms,
                ratio=1.0,
                backend="transformers",
                name="dynamiccache",
                length=self.length,
            )
        )
        for row in rows:
            row.extra = {k: v for k, v in machine().items() if k != "backend"}
        return rows


def run(
    out: Path,
    *,
    length: int = 1024,
    samples: int = 32,
    windows: int = 16,
    share: float = 1 / 8,
    seed: int = 0,
    folder: str | None = None,
) -> Results:
    """Measure, print, and write ``report.json`` and ``demo.png`` into ``out``."""
    require_extras()
    screen = console()
    began = time.perf_counter()
    with screen.status("Loading the model and Python's documentation as text") if screen.is_terminal else _Quiet():
        plain = load_model(folder, torch.float32)
        tokenizer = load_tokenizer(folder)
        wrapped = wrap(share_weights(plain))
        examples = {task: draw_examples(task, length, samples, seed) for task in QUESTIONS}
        text = draw_windows(length, windows, seed)
    layers = plain.config.num_hidden_layers
    compared = [contender(name, length, share, layers) for name in DEMO]
    _introduce(screen, plain, length, share, samples, windows)

    total = len(compared) * (len(QUESTIONS) * samples + windows) + (ROUNDS + 1) * ROUND_TICKS
    answers: dict[tuple[str, str], Answers] = {}
    bits: dict[str, Bits] = {}
    with ticking(screen, total) as progress:
        for c in compared:
            for task in QUESTIONS:
                progress.phase(f"{task}, {c.label}")
                answers[task, c.name] = generate_answers(wrapped, c.policy, examples[task], tick=progress.tick)
            progress.phase(f"text, {c.label}")
            bits[c.name] = text_bits(wrapped, c.policy, text, tick=progress.tick)
        progress.phase("decode time, all side by side")
        times = decode_times(
            plain,
            wrapped,
            [c.policy for c in compared],
            examples["passkey"][0].prompt,
            rounds=ROUNDS,
            tick=lambda rounds: progress.tick(rounds * ROUND_TICKS),
        )
    which = _typical(answers)
    results = Results(
        compared,
        answers,
        bits,
        times,
        examples["passkey"][which],
        {c.name: tokenizer.decode(answers["passkey", c.name].tokens[which][0]) for c in compared},
        length,
        time.perf_counter() - began,
    )
    _show_prompt(screen, results)
    _show_table(screen, results, share)
    report = write_report(out, results.rows())
    from .plots import plot_demo

    plot = plot_demo(results.rows(), out / "demo.png")
    screen.print(f"Took {results.seconds:.0f} s. Written: {report} and {plot}", markup=False, soft_wrap=True)
    return results


class _Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _typical(answers: dict[tuple[str, str], Answers]) -> int:
    """Index of the passkey question to show: the first on which most policies do what they do on most questions."""
    agreement = sum(
        (a.scores[:, 0] == (a.accuracy >= 0.5)).astype(int) for (task, _), a in answers.items() if task == "passkey"
    )
    return int(np.argmax(agreement))


def _introduce(screen: Console, model: Any, length: int, share: float, samples: int, windows: int) -> None:
    config = model.config
    size = sum(p.numel() for p in model.parameters()) / 1e6
    kind = type(model).__name__.removesuffix("ForCausalLM")
    facts = machine()
    screen.print(
        f"\n[bold]kvcache demo[/] · a byte-level {kind} of {size:.1f} M parameters, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads}/{config.num_key_value_heads} heads, "
        f"on the CPU, {facts['threads']} thread{'s' if facts['threads'] != 1 else ''}, "
        f"{facts['backend']} kernels ({facts['isa']})"
    )
    screen.print(
        f"[dim]Context {length:,} tokens, budget 1/{round(1 / share)} = {round(length * share)} entries per head. "
        f"{samples} questions per task, {windows} windows of text.[/]\n"
    )


def _show_prompt(screen: Console, results: Results) -> None:
    from rich.text import Text

    example = results.shown
    prompt, expected = decode(example.prompt[1:]), decode(example.answer)
    question = prompt[example.question_start - 1 :]
    key, value = question[1:-1], expected[:-1]
    needle = f"#{key}:{value};"
    context = prompt[: example.question_start - 1]
    at = context.find(needle)
    around = context[max(0, at - 90) : at], context[at + len(needle) : at + len(needle) + 90]
    before, after = (re.sub(r"\s+", " ", part) for part in around)
    screen.print(
        f"[bold]One passkey question[/] [dim]· a needle at byte {at:,} of {len(context):,}, seven others elsewhere; "
        "every cache was compressed before the question came[/]"
    )
    line = Text("  … ")
    line.append(before, "dim")
    line.append(needle, "bold yellow")
    line.append(after, "dim")
    line.append(" …  ")
    line.append(question, "bold cyan")
    screen.print(line)
    for c in results.contenders:
        said = results.shown_answers[c.name].removesuffix(";").encode("unicode_escape").decode().replace(" ", "·")
        right = results.shown_answers[c.name] == expected
        answer = Text(f"  {c.label:<14}")
        answer.append(f"{said} {'✓' if right else '✗'}", "bold green" if right else "bold red")
        screen.print(answer)


def _show_table(screen: Console, results: Results, share: float) -> None:
    grid = table(narrow=screen.width < 90)
    grid.add_column("Policy", no_wrap=True)
    heads = (
        "Passkey\nright", "Recall\nright", "Text\nbits/byte", "Cache\nheld", "of\nfull", "read\n/step",
        "Decode\nms/token", "ratio to\nDynamic",
    )  # fmt: skip
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    base = results.times["DynamicCache"]
    dense = results.answers["passkey", "full"].held.full_nbytes
    grid.add_row(
        "[dim]DynamicCache[/]", "", "", "", f"[dim]{human_bytes(dense)}[/]", "[dim]100%[/]", "",
        f"[dim]{base.ms:.2f}[/]", "[dim]1.00[/]",
    )  # fmt: skip
    best = results.answers["passkey", "full"].accuracy
    for c in results.contenders:
        passkey, recall = results.answers["passkey", c.name], results.answers["recall", c.name]
        held, t = passkey.held, results.times[c.policy]
        grid.add_row(
            c.label,
            _graded(passkey.accuracy, best),
            _graded(recall.accuracy, results.answers["recall", "full"].accuracy),
            f"{results.bits[c.name].mean:.3f}",
            human_bytes(held.nbytes),
            f"{held.nbytes / held.full_nbytes:.0%}",
            f"{held.read:.0f}",
            f"{t.ms:.2f}",
            f"{t.ratio:.2f}",
        )
    screen.print(grid)
    n = len(results.answers["passkey", "full"].scores)
    notes = [
        f"right: share of {n} questions answered in every byte (report.json and the plot have 95 % intervals).",
        "bits/byte: lower is better; second half of each window, decoded byte by byte through the cache.",
        "held: whole pages of keys and values of one sequence after the context. read: entries that a step attends.",
        "TokenSelect evicts nothing: it holds all and reads a few. SkipDecode leaves out layers, which a model must be "
        "fine-tuned for; this one is not, so it errs.",
        "ratio: to transformers' DynamicCache on the unwrapped model, timed in turns; below 1 is faster. In a model "
        "this small a step is mostly Python: kvcache bench times a larger one behind 8,192 tokens.",
    ]
    for note in notes:
        _note(screen, note)
    _note(screen, "policies: " + " · ".join(c.policy for c in results.contenders))
    screen.print()


def _note(screen: Console, text: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    screen.print(Padding(Text("· " + text, "dim"), (0, 0, 0, 0)))


def _graded(value: float, best: float) -> str:
    colour = "green" if value >= 0.95 * best else "yellow" if value >= 0.5 * best else "red"
    return f"[{colour}]{value:.0%}[/]"
