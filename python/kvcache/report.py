"""What a cache holds, as a table for people and as rows for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def human_bytes(n: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


@dataclass(frozen=True)
class Report:
    """Result of ``KVCache.report()``: one row per layer and the totals.

    ``reserved_nbytes``: pages taken from the allocator, held or free. ``side_nbytes``: tables, positions and scores.
    ``decode``: how single tokens run on a GPU: by graphs, or without and why.
    """

    policy: str
    rows: list[dict[str, Any]]
    reserved_nbytes: int
    side_nbytes: int
    decode: str = "eager"

    @property
    def nbytes(self) -> int:
        return sum(r["nbytes"] for r in self.rows)

    @property
    def full_nbytes(self) -> int:
        return sum(r["full_nbytes"] for r in self.rows)

    def __str__(self) -> str:
        head = f"{'layer':>5} {'seen':>7} {'kept':>13} {'pages':>7} {'bytes':>10} {'of full':>8} {'evicted':>8}"
        extra = any(r["selections"] or r["reuses"] for r in self.rows)
        lines = [f"policy {self.policy}", head + (f" {'reuse':>6}" if extra else "")]
        for r in self.rows:
            same = r["kept_min"] == r["kept_max"]
            kept = f"{r['kept_max']}" if same else f"{r['kept_min']}-{r['kept_max']}"
            share = f"{r['nbytes'] / r['full_nbytes']:.1%}" if r["full_nbytes"] else "-"
            line = f"{r['layer']:>5} {r['seen']:>7} {kept:>13} {r['pages']:>7} {human_bytes(r['nbytes']):>10}"
            line += f" {share:>8} {r['evictions']:>8}"
            if extra:
                total = r["selections"] + r["reuses"]
                line += f" {r['reuses'] / total:>6.0%}" if total else f" {'-':>6}"
            lines.append(line)
        share = f" ({self.nbytes / self.full_nbytes:.1%})" if self.full_nbytes else ""
        lines.append(
            f"total {human_bytes(self.nbytes)} of {human_bytes(self.full_nbytes)} dense{share}; "
            f"{human_bytes(self.reserved_nbytes)} reserved, {human_bytes(self.side_nbytes)} tables and side columns"
        )
        if self.decode != "eager":
            lines.append(f"decode {self.decode}")
        return "\n".join(lines)
