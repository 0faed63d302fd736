"""PNG plots of report rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import label
from .rows import Row

__all__ = ["plot_budgets", "plot_bytes", "plot_contexts", "plot_demo", "task_title"]

# Okabe and Ito's palette: told apart by everyone; the markers differ as well.
STYLE: dict[str, tuple[str, str]] = {
    "full": ("#000000", "o"),
    "streamingllm": ("#E69F00", "s"),
    "h2o": ("#009E73", "^"),
    "tokenselect": ("#0072B2", "D"),
    "skipdecode": ("#CC79A7", "v"),
    "window": ("#D55E00", "P"),
    "random": ("#8C8C8C", "X"),
}
TITLES = {
    "passkey": "Passkey in text",
    "recall": "Multi-query recall",
    "turns": "Four passkeys, one a turn",
    "two_hop": "Two hops",
    "frequent_words": "Most frequent word",
    "copy": "Copying 64 bytes",
    "text": "Running text",
}
# Policies beyond the palette: Tol's muted colours and more markers, in the order in which they are met.
MORE = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#CC6677", "#882255", "#AA4499", "#661100", "#6699CC")
MARKERS = "<>phdHv8*X"


def task_title(task: str) -> str:
    """The name for people of a task."""
    return TITLES.get(task, task)


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every name."""
    others = [name for name in names if name not in STYLE]
    more = {name: (MORE[i % len(MORE)], MARKERS[i * 7 % len(MARKERS)]) for i, name in enumerate(others)}
    return {name: STYLE.get(name) or more[name] for name in names}


def figure(columns: int, width: float = 4.1, height: float = 3.9) -> tuple[Any, Any]:
    """A figure with ``columns`` panels in the house's style, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E4E4E4",
            "axes.axisbelow": True,
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
        }
    )
    return plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)


def plot_demo(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy (passkey, recall) and bits per byte (text) against the cache bytes really held, one point a policy."""
    tasks = ("passkey", "recall", "text")
    fig, axes = figure(len(tasks))
    for ax, task in zip(axes[0], tasks):
        points = [r for r in rows if r.task == task]
        for row, x in zip(points, _spread([(r.nbytes or 0) / 2**20 for r in points])):
            _point(ax, row, x)
        ax.set_xlabel("cache held per sequence, MiB")
        ax.set_xlim(left=0)
        ax.margins(x=0.12, y=0.15)
        _quality(ax, task, points)
    first = rows[0]
    share = next((r.budget for r in rows if r.budget not in (None, 1.0)), 1.0)
    title = f"Quality against cache bytes: context {first.length:,} tokens, budget 1/{round(1 / (share or 1))}"
    return _finish(fig, axes[0][0], title, path)


def _point(ax: Any, row: Row, x: float) -> None:
    """One measurement with its interval, at ``x``."""
    colour, marker = STYLE.get(row.name, ("#56B4E9", "*"))
    bars = None
    if row.accuracy is not None and row.interval is not None:
        y, low, high = row.accuracy * 100, row.interval[0] * 100, row.interval[1] * 100
        bars = [[max(y - low, 0)], [max(high - y, 0)]]
    else:
        y = row.bits_per_byte or 0.0  # windows differ more from each other than policies do: no bars
    ax.errorbar(
        x, y, yerr=bars, color=colour, marker=marker, markersize=8, capsize=3, elinewidth=1.2, linestyle="none",
        label=label(row.name),
    )  # fmt: skip


def _spread(xs: list[float]) -> list[float]:
    """Move equal values a little apart, so that no marker hides another."""
    step = 0.03 * max(xs, default=1.0)
    placed: list[float] = []
    for x in xs:
        same = sum(abs(x - other) < step for other in xs)
        before = sum(abs(x - other) < step for other in xs[: len(placed)])
        placed.append(x + step * (before - (same - 1) / 2))
    return placed


def _leave_out_far(ax: Any, rows: Sequence[Row]) -> None:
    """Fit the axis to the policies near the best one; name those beyond it at the upper edge."""
    values = {r.name: r.bits_per_byte for r in rows if r.bits_per_byte is not None}
    best = min(values.values(), default=0.0)
    far = {name: v for name, v in values.items() if v > 1.3 * best}
    near = [v for name, v in values.items() if name not in far]
    if not far or not near:
        return
    spread = max(max(near) - min(near), 0.02)
    ax.set_ylim(min(near) - 0.4 * spread, max(near) + 0.6 * spread)
    beyond = ", ".join(f"{label(name)} {v:.2f}" for name, v in far.items())
    ax.text(0.5, 0.985, f"beyond the axis: {beyond} ↑", transform=ax.transAxes, ha="center", va="top", fontsize=9)


def _finish(fig: Any, ax: Any, title: str, path: Path, columns: int = 7) -> Path:
    """Legend of ``ax`` below everything, title above; write ``path``."""
    import matplotlib.pyplot as plt

    handles, labels = ax.get_legend_handles_labels()
    known = dict(zip(labels, handles))
    lines = -(-len(known) // columns)
    fig.legend(known.values(), known.keys(), loc="lower center", ncol=min(len(known), columns), frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout(rect=(0, 0.02 + 0.05 * lines, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def plot_budgets(rows: Sequence[Row], path: Path) -> Path:
    """Quality of every policy against its budget, one panel a task; what has no budget is a horizontal line."""
    tasks = list(dict.fromkeys(r.task for r in rows))
    fig, axes = figure(len(tasks))
    styles = _styles(list(dict.fromkeys(r.name for r in rows)))
    for ax, task in zip(axes[0], tasks):
        mine = [r for r in rows if r.task == task and r.budget is not None]
        for name in dict.fromkeys(r.name for r in mine):
            line = sorted((r for r in mine if r.name == name), key=lambda r: r.budget or 0)
            colour, marker = styles[name]
            if len(line) == 1 and line[0].budget == 1.0:
                y = line[0].accuracy * 100 if line[0].accuracy is not None else line[0].bits_per_byte or 0.0
                ax.axhline(y, color=colour, linewidth=1.2, linestyle="--", label=label(name))
                continue
            xs = [r.budget for r in line]
            ys = [r.accuracy * 100 if r.accuracy is not None else r.bits_per_byte for r in line]
            ax.plot(xs, ys, color=colour, marker=marker, markersize=7, linewidth=1.6, label=label(name))
            if task != "text":
                low = [(r.interval or (0, 0))[0] * 100 for r in line]
                high = [(r.interval or (0, 0))[1] * 100 for r in line]
                ax.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        shares = sorted({r.budget for r in mine if r.budget not in (None, 1.0)})
        ax.set_xscale("log", base=2)
        ax.set_xticks(shares, [f"1/{round(1 / x)}" for x in shares])
        ax.minorticks_off()
        ax.set_xlabel("budget: share of the context kept or read")
        _quality(ax, task, mine)
    return _finish(fig, axes[0][0], f"Quality against budget, context {rows[0].length:,} tokens", path)


def plot_bytes(rows: Sequence[Row], path: Path) -> Path:
    """Quality against the bytes really held, as a share of a dense cache's: one panel a task, one line a policy.

    Policies that select hold everything: their line stands at 100 %, and what they read is in :func:`plot_budgets`.
    """
    tasks = list(dict.fromkeys(r.task for r in rows))
    fig, axes = figure(len(tasks))
    styles = _styles(list(dict.fromkeys(r.name for r in rows)))
    for ax, task in zip(axes[0], tasks):
        mine = [r for r in rows if r.task == task and r.nbytes and r.full_nbytes]
        for name, (colour, marker) in styles.items():
            line = sorted((r for r in mine if r.name == name), key=_share_held)
            xs = [_share_held(r) * 100 for r in line]
            ys = [r.accuracy * 100 if r.accuracy is not None else r.bits_per_byte for r in line]
            if line:
                ax.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=1.4, label=label(name))
        ax.set_xscale("log", base=2)
        ticks = (6.25, 12.5, 25, 50, 100)
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel("bytes held, % of a dense cache")
        _quality(ax, task, mine)
    return _finish(fig, axes[0][0], f"Quality against bytes really held, context {rows[0].length:,} tokens", path)


def _share_held(row: Row) -> float:
    return (row.nbytes or 0) / (row.full_nbytes or 1)


def _quality(ax: Any, task: str, rows: Sequence[Row]) -> None:
    """Title and the axis of accuracy or of bits per byte."""
    ax.set_title(task_title(task))
    if task == "text":
        ax.set_ylabel("bits per byte (lower is better)")
        _leave_out_far(ax, rows)
    else:
        ax.set_ylabel("answers right, % (with 95 % interval)")
        ax.set_ylim(-4, 104)


# Other libraries' caches: grey and brown tones, beside the policies' colours.
THEIRS: dict[str, tuple[str, str]] = {
    "DynamicCache + sdpa": ("#666666", "o"),
    "DynamicCache + eager": ("#B0B0B0", "s"),
    "StaticCache + sdpa": ("#A6761D", "^"),
    "StaticCache + torch.compile": ("#66451A", "v"),
}


def plot_contexts(rows: Sequence[Row], path: Path) -> Path:
    """Milliseconds per token against the context, one line a contender, the limit of each dashed in its colour.

    ``rows`` of ``kvcache bench``; one panel for every model and batch. Rows without a time are not drawn.
    """
    timed = [r for r in rows if r.ms_per_token is not None]
    panels = list(dict.fromkeys((r.extra["model"], r.extra["batch"]) for r in timed))
    fig, axes = figure(len(panels), width=5.6, height=4.6)
    for ax, (model, batch) in zip(axes[0], panels):
        mine = [r for r in timed if (r.extra["model"], r.extra["batch"]) == (model, batch)]
        for name in dict.fromkeys(_family(r) for r in mine):
            line = sorted((r for r in mine if _family(r) == name), key=lambda r: r.length or 0)
            colour, marker = STYLE.get(line[0].name) or THEIRS.get(name) or ("#56B4E9", "*")
            ours = line[0].backend not in ("transformers", "kvpress")
            xs = [r.length for r in line]
            ax.plot(
                xs, [r.ms_per_token for r in line], color=colour, marker=marker, markersize=6, label=name,
                linewidth=2.0 if ours else 1.2, alpha=1.0 if ours else 0.85,
            )  # fmt: skip
            if ours:
                ax.plot(xs, [r.extra["limit_ms"] for r in line], color=colour, linestyle="--", linewidth=1.2)
        ax.plot([], [], color="#000000", linestyle="--", linewidth=1.2, label="limit of each policy")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _plain_ticks(ax)
        lengths = sorted({r.length for r in mine if r.length is not None})
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.xaxis.minorticks_off()
        ax.set_title(f"{model}, batch {batch}")
        ax.set_xlabel("context, tokens")
        ax.set_ylabel("ms per token")
    device = timed[0].extra.get("gpu") or f"{timed[0].extra.get('cpu', '')}, {timed[0].extra.get('threads', 1)} thread"
    return _finish(fig, axes[0][0], f"Decode time of generate() on {device}", path, columns=2 * len(panels))


def _plain_ticks(ax: Any) -> None:
    """A logarithmic axis with 1, 2, 5, 10, 20, ... written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _family(row: Row) -> str:
    """One line in the plot: a policy whose numbers follow the context is the same policy at all of them."""
    shares = row.name == "tokenselect"
    return label(row.name) if shares else row.policy
