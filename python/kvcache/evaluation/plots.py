"""PNG plots of report rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import label
from .rows import Row

__all__ = ["plot_demo"]

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
TITLES = {"passkey": "Passkey in text", "recall": "Multi-query recall", "text": "Running text"}


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
    import matplotlib.pyplot as plt

    tasks = ("passkey", "recall", "text")
    fig, axes = figure(len(tasks))
    for ax, task in zip(axes[0], tasks):
        for row in rows:
            if row.task != task or row.nbytes is None or row.interval is None:
                continue
            colour, marker = STYLE[row.name]
            y = row.accuracy * 100 if row.accuracy is not None else row.bits_per_byte
            scale = 100 if row.accuracy is not None else 1
            low, high = row.interval
            bars = None if task == "text" else [[max(y - low * scale, 0)], [max(high * scale - y, 0)]]
            ax.errorbar(
                row.nbytes / 1024, y, yerr=bars, color=colour, marker=marker, markersize=9, capsize=3, elinewidth=1,
                linestyle="none", label=label(row.name), alpha=0.9,
            )  # fmt: skip
        ax.set_title(TITLES[task])
        ax.set_xlabel("cache held per sequence, KiB")
        ax.set_xlim(left=0)
        ax.margins(x=0.12, y=0.12)
        if task == "text":
            ax.set_ylabel("bits per byte (lower is better)")
        else:
            ax.set_ylabel("answers right, %  (95 % interval)")
            ax.set_ylim(-4, 104)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    first = rows[0]
    fig.suptitle(
        f"Quality against cache bytes, context {first.length:,} tokens, budget 1/8; cache compressed before the question",
        fontsize=11,
    )
    fig.tight_layout(rect=(0, 0.07, 1, 0.97))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
