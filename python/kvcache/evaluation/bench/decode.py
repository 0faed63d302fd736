"""``kvcache bench``: decode time of ``generate()`` behind a context, next to what the memory allows.

Models by shape with random weights; contexts of random keys and values (the time of a step does not depend on what the
entries are, nor on which of them stay). All contenders share weights and ids. Each round lets every contender generate
a few tokens, in rotating order; medians over all tokens, ratios per round. Where their caches do not fit into memory
together, they run one after the other instead, and the report says so. One CPU thread is timed by its processor time,
which other work on the machine disturbs less; the wall time is reported too. A contender that cannot run is a row with
its reason.

The limit of a step is (bytes of weights + bytes of keys and values that its attention reads) / read bandwidth, the
latter probed in the same run. The time to the first token reads a real prompt of the context's length, up to
``prefill`` tokens; longer ones are not measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ... import _C
from ...policies import parse_policy
from ...report import human_bytes
from ..console import Ticker, console, require_extras, table, ticking
from ..rows import Row, machine, write_report
from .caches import Context
from .contender import BASELINE, Contender, LeftOut
from .limits import entry_bytes, free_memory, read_bandwidth
from .setting import CONTENDERS, DEFAULTS, PRESSES, Setting, default_policies, pinned
from .shapes import Shape, build, shape_named

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]


def run(
    out: Path,
    *,
    models: Sequence[str] = (),
    device: str = "auto",
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
    rounds: int = 5,
    tokens: int = 12,
    threads: int = 1,
    policies: Sequence[str] = (),
    only: Sequence[str] = ("dynamic", "eager", "static", "compile", "quanto", "kvpress", "kvcache"),
    prefill: int | None = None,
    dtype: str | None = None,
    presses: Sequence[tuple[str, dict[str, Any]]] = PRESSES,
    kvpress_python: str | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> list[Row]:
    """Measure, print, and write ``report.json`` and ``generate.png`` into ``out``; returns its rows.

    ``models``: names of :data:`~.shapes.SHAPES`; empty ``models``, ``batches``, ``contexts`` and None ``prefill``: the
    :data:`DEFAULTS` of the device. ``seconds``: begin no other setting after this long. Raises ValueError for what is
    not known.
    """
    require_extras()
    kind = device if device != "auto" else "cuda" if _cuda_works() else "cpu"
    if kind.startswith("cuda") and not _cuda_works():
        raise ValueError(f"device {device}: no GPU here, or kvcache was built without nvcc")
    defaults = DEFAULTS["cuda" if kind.startswith("cuda") else "cpu"]
    models, batches, contexts = (
        tuple(given or defaults[name])
        for given, name in ((models, "models"), (batches, "batches"), (contexts, "contexts"))
    )
    prefill = defaults["prefill"] if prefill is None else prefill
    shapes = [shape_named(name) for name in models]
    for policy in policies:
        parse_policy(policy)
    if unknown := set(only) - set(CONTENDERS):
        raise ValueError(f"unknown contenders {sorted(unknown)}; known: {', '.join(CONTENDERS)}")
    weight_type = None if dtype is None else getattr(torch, dtype)
    screen = console()
    torch.set_num_threads(threads)
    started = time.monotonic()
    rows: list[Row] = []
    room = (rounds + 1) * (tokens + 2) + 8  # what the cache grows by, with the round that looks at memory
    with pinned(threads == 1 and kind == "cpu") as cpu, tempfile.TemporaryDirectory() as folder:
        bandwidth = read_bandwidth(kind)
        facts = {**machine(), "threads": threads, **_gpu(kind)}
        _title(screen, facts, cpu, rounds, tokens)
        for shape in shapes:
            model = build(shape, max(contexts) + room + 1, device=kind, dtype=weight_type, seed=seed)
            screen.print(f"[bold]{shape.name}[/] · {shape}")
            weights = _saved(model, Path(folder) / f"{shape.name}.safetensors")
            for batch, context in ((b, c) for b in batches for c in contexts):
                if seconds is not None and time.monotonic() - started > seconds:
                    screen.print(f"[dim]left out, the time was up: batch {batch}, context {context:,}[/]")
                    continue
                need = entry_bytes(model) * batch * (context + room)
                if need > free_memory(kind):
                    rows.append(_left_out(shape, batch, context, kind, "every cache", f"needs {human_bytes(need)}"))
                    screen.print(f"[dim]batch {batch}, context {context:,} needs {human_bytes(need)}: left out[/]")
                    continue
                setting = Setting(
                    shape, model, Context.random(model, batch, context, seed), context + room,
                    policies or default_policies(context, kind.split(":")[0]), only, prefill, presses, kvpress_python,
                    weights, cpu,
                )  # fmt: skip
                contenders, together = _measure(setting, rounds, tokens, screen)
                bandwidth = max(bandwidth, read_bandwidth(kind, repeats=5))  # other work may have slowed the first one
                found = _rows(setting, contenders, bandwidth, rounds * tokens, kind)
                for row in found:
                    row.extra |= {k: v for k, v in facts.items() if k != "backend"}
                    row.extra |= {"read_gb_per_s": bandwidth / 1e9, "paired": together}
                _show(screen, setting, found, bandwidth)
                rows += found
                write_report(out, rows)  # after every setting: whoever stops the run keeps what it has
            del model
    path = write_report(out, rows)
    screen.print(f"Written: {path}", markup=False, soft_wrap=True)
    if any(r.ms_per_token is not None for r in rows):
        from ..plots import plot_contexts

        screen.print(f"Written: {plot_contexts(rows, out / 'generate.png')}", markup=False, soft_wrap=True)
    return rows


def _cuda_works() -> bool:
    return torch.cuda.is_available() and bool(_C.cuda_info()["compiled"])


def _gpu(device: str) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}


def _title(screen: Console, facts: dict[str, Any], cpu: int | None, rounds: int, tokens: int) -> None:
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    if cpu is not None:
        threads += f" pinned to CPU {cpu}"
    place = facts.get("gpu") or f"{facts['cpu']}, {threads}, {facts['backend']} kernels ({facts['isa']})"
    screen.print("\n[bold]kvcache bench[/] · generate() with random weights")
    screen.print(f"[dim]{place}; {rounds} rounds of {tokens} tokens[/]\n")


def _saved(model: PreTrainedModel, path: Path) -> Callable[[], Path]:
    """Writes the weights when they are first asked for."""

    def save() -> Path:
        if not path.exists():
            from safetensors.torch import save_file

            known: set[int] = set()  # a tied table once: safetensors refuses shared memory
            tensors = {}
            for name, tensor in model.state_dict().items():
                if tensor.data_ptr() not in known:
                    known.add(tensor.data_ptr())
                    tensors[name] = tensor.contiguous().cpu()
            save_file(tensors, path)
        return path

    return save


def _measure(setting: Setting, rounds: int, tokens: int, screen: Console) -> tuple[list[Contender], bool]:
    """All rounds of all contenders; those that failed are in ``setting.left_out``. Also: did they take turns?"""
    contenders = setting.contenders()
    context = setting.context
    each = entry_bytes(setting.model) * context.rows * setting.room
    # A pool that grows holds the old one beside the new one for a moment.
    together = each * (len(contenders) + 1) < free_memory(setting.model.device) / 2
    label = f"batch {context.rows}, {context.length:,} tokens"
    with ticking(screen, (rounds + 3) * len(contenders)) as progress:
        groups = [contenders] if together else [[c] for c in contenders]
        finished: list[Contender] = []
        for group in groups:
            finished += _turns(setting, group, rounds, tokens, progress, label)
    return finished, together


def _turns(
    setting: Setting, group: list[Contender], rounds: int, tokens: int, progress: Ticker, label: str
) -> list[Contender]:
    alive = list(group)

    def attempt(c: Contender, action: Callable[[], Any]) -> None:
        if c not in alive:
            return
        try:
            action()
        except KeyboardInterrupt:
            raise
        except Exception as error:  # another library's failure is a result, too; ours as well
            setting.left_out[c.name] = reason(error)
            alive.remove(c)
            c.close()
        progress.tick()

    for c in group:
        progress.phase(f"{label}, {c.name}")
        attempt(c, c.prepare)
    for r in range(rounds + 1):
        progress.phase(f"{label}, round {r} of {rounds}")
        turn = r % len(group)
        for c in group[turn:] + group[:turn]:
            attempt(c, lambda c=c: c.round(tokens))  # type: ignore[misc]
        if r == 0:
            for c in list(alive):
                c.wall, c.cpu = [], []  # it warmed up
                attempt(c, c.memory_round)
    for c in alive:
        c.finish()
        if len(group) == 1:
            c.close()  # before a prompt needs the room
    reads = setting.context.length <= setting.prefill
    for c in list(alive):
        if reads and "compile" not in c.name:
            progress.phase(f"{label}, first token, {c.name}")
            attempt(c, c.first_token)
    return alive


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind; what a row says of a contender that did not run."""
    if isinstance(error, LeftOut):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".strip()


def _rows(setting: Setting, contenders: list[Contender], bandwidth: float, samples: int, device: str) -> list[Row]:
    base = next((c for c in contenders if c.name == BASELINE), None)
    found = [_row(setting, c, base, bandwidth, samples, device) for c in contenders]
    for c in contenders:
        c.close()
    batch, context = setting.context.rows, setting.context.length
    return found + [
        _left_out(setting.shape, batch, context, device, name, why) for name, why in setting.left_out.items()
    ]


def _left_out(shape: Shape, batch: int, context: int, device: str, name: str, why: str) -> Row:
    return Row(name, "generate", device=device, length=context,
               extra={"model": shape.name, "batch": batch, "left_out": why})  # fmt: skip


def _row(setting: Setting, c: Contender, base: Contender | None, bandwidth: float, samples: int, device: str) -> Row:
    model, batch = setting.model, setting.context.rows
    clock = "cpu" if torch.get_num_threads() == 1 and device == "cpu" else "wall"
    limit = c.step_nbytes / bandwidth * 1e3
    ms = c.median(clock)
    seen = setting.context.length + setting.room
    return Row(
        c.name,
        "generate",
        name=c.name.split("(")[0] if c.library == "kvcache" else "",
        backend=machine()["backend"] if c.library == "kvcache" else c.library,
        nbytes=c.nbytes // batch,
        full_nbytes=seen * entry_bytes(model),
        read=c.kept,
        ms_per_token=ms,
        ratio=None if base is None else c.ratio(base, clock),
        length=setting.context.length,
        samples=samples,
        device=device,
        extra={
            "model": setting.shape.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch": batch,
            "clock": clock,
            "tokens_per_s": batch * 1e3 / ms,
            "wall_ms_per_token": c.median("wall"),
            "wall_ratio": None if base is None else c.ratio(base, "wall"),
            "limit_ms": limit,
            "of_limit": limit / ms,
            **_prefill(c, clock),
            "peak_nbytes": c.peak,
            **c.extra,
        },
    )


def _prefill(c: Contender, clock: str) -> dict[str, Any]:
    if c.prefill is None:
        return {}
    wall, cpu = c.prefill
    found: dict[str, Any] = {"first_token_s": cpu if clock == "cpu" else wall, "first_token_wall_s": wall}
    return found if c.prefill_peak is None else {**found, "prefill_peak_nbytes": c.prefill_peak}


def _show(screen: Console, setting: Setting, rows: list[Row], bandwidth: float) -> None:
    context = setting.context
    screen.print(f"[bold]Decode behind {context.length:,} tokens of context, batch {context.rows}[/]")
    grid = table(narrow=screen.width < 110)
    grid.add_column("Cache")
    heads = ("held", "peak", "first\ntoken s", "ms/\ntoken", "wall\nms", "tokens\n/s", "ratio to\nDynamic",
             "limit\nms", "% of\nlimit")  # fmt: skip
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        x, ours = row.extra, row.backend not in ("transformers", "kvpress")
        if row.ms_per_token is None:
            grid.add_row(f"[dim]{row.policy}: {_plain(x['left_out'])}[/]")
            continue
        first = x.get("first_token_s")
        grid.add_row(
            row.policy if ours else f"[dim]{row.policy}[/]",
            human_bytes((row.nbytes or 0) * context.rows),
            "" if x["peak_nbytes"] is None else human_bytes(x["peak_nbytes"]),
            "" if first is None else f"{first:.2f}",
            f"{row.ms_per_token:.1f}",
            f"{x['wall_ms_per_token']:.1f}",
            f"{x['tokens_per_s']:.1f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{x['limit_ms']:.1f}",
            f"{x['of_limit']:.0%}",
        )
    screen.print(grid)
    screen.print(
        "[dim]· ratio: below 1 is faster than DynamicCache + sdpa, median of paired rounds.\n"
        f"· limit: weights and the keys and values that attention reads, at {bandwidth / 1e9:.1f} GB/s, "
        "probed in this run. TokenSelect also reads keys to vote, which its limit leaves out.\n"
        "· peak: what the cache has allocated and what a round of steps takes on top.[/]\n"
    )


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
