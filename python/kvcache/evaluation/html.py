"""``report.html``: a run of ``kvcache eval`` in one file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .contenders import label
from .measured import Claim
from .plots import task_title
from .rows import Row

__all__ = ["write_html"]

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>kvcache eval</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: .5em 0 2em }}
th, td {{ padding: .25em .9em; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
small {{ color: #777 }}
</style>
<h1>kvcache eval</h1>
<p>{settings}</p>
{body}
</html>
"""


def write_html(path: Path, rows: Sequence[Row], made: Sequence[Claim], plots: Sequence[Path]) -> Path:
    """Tables of ``rows``, the comparisons ``made`` and the PNG files ``plots`` as one page; returns ``path``."""
    first = rows[0]
    facts = {"context": f"{first.length:,} tokens", "protocol": next((r.protocol for r in rows if r.protocol), None)}
    facts |= {k: v for k, v in first.extra.items() if k not in ("load", "by_turn")}
    settings = " · ".join(f"{escape(str(k))}: {escape(str(v))}" for k, v in facts.items() if v is not None)
    parts = [f"<p>{'✓' if c.holds else '✗'} {escape(c.text)} <small>({escape(c.measured)})</small></p>" for c in made]
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f'<img alt="{escape(plot.stem)}" src="data:image/png;base64,{data}">')
    for task in dict.fromkeys(r.task for r in rows):
        parts += [f"<h2>{escape(task_title(task))}</h2>", _table([r for r in rows if r.task == task])]
    path.write_text(_PAGE.format(settings=settings, body="\n".join(parts)))
    return path


def _table(rows: Sequence[Row]) -> str:
    text = rows[0].accuracy is None
    turns = any("by_turn" in r.extra for r in rows)
    head = ["Policy", "Bits per byte" if text else "Right", "95 % interval", "Held", "of full", "Read per step"]
    head += [] if text else ["Worse than full", "Better"]
    head += ["By turn"] if turns else []
    lines = [_line("th", head)]
    for r in rows:
        low, high = r.interval or (0.0, 0.0)
        cells = [f"{escape(label(r.name))}<br><small>{escape(r.policy)}</small>"]
        cells += [f"{r.bits_per_byte:.3f}", f"{low:.3f} to {high:.3f}"] if text else []
        cells += [] if text else [f"{r.accuracy:.1%}", f"{low:.0%} to {high:.0%}"]
        cells += [
            f"{(r.nbytes or 0) / 1024:,.0f} KiB",
            f"{(r.nbytes or 0) / (r.full_nbytes or 1):.1%}",
            f"{r.read:.0f}",
        ]
        if not text:
            cells += [str(r.extra.get(k, "")) for k in ("worse_than_full", "better_than_full")]
        if turns:
            cells.append(" ".join(f"{x:.0%}" for x in r.extra.get("by_turn", ())))
        lines.append(_line("td", cells))
    return f"<table>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
