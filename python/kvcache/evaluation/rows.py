"""Rows of ``report.json``: what ``kvcache demo | eval | bench`` write for programs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import _C, ops

__all__ = ["Row", "machine", "write_report"]


@dataclass
class Row:
    """One measurement. ``accuracy`` or ``bits_per_byte`` (with a 95 % ``interval``) is set, depending on the task.

    ``nbytes``: bytes of pages held per sequence; ``full_nbytes``: what a dense cache would hold; ``read``: entries that
    a step's attention reads, mean per layer and kv head. ``ms_per_token``: median decode step, ``ratio``: its ratio to
    transformers' ``DynamicCache`` on the unwrapped model in the same run (below 1 is faster).
    """

    policy: str
    task: str
    accuracy: float | None = None
    bits_per_byte: float | None = None
    interval: tuple[float, float] | None = None
    nbytes: int | None = None
    full_nbytes: int | None = None
    read: float | None = None
    ms_per_token: float | None = None
    ratio: float | None = None
    backend: str = field(default_factory=ops.backend)
    device: str = "cpu"
    name: str = ""
    budget: float | None = None
    length: int | None = None
    samples: int | None = None
    protocol: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out, floats keep six significant digits."""
        values = {k: v for k, v in asdict(self).items() if v is not None and v != "" and k != "extra"}
        return {k: _short(v) for k, v in {**values, **self.extra}.items()}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    return value


def machine() -> dict[str, Any]:
    """What a number depends on besides the code: versions, backend, instruction set, threads, processor, load."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": ops.backend(),
        "isa": _C.isa,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu": processor(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def processor() -> str:
    """Name of the processor, as the system tells it; "unknown" where it does not."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return os.uname().machine if hasattr(os, "uname") else "unknown"


def write_report(out: Path, rows: list[Row]) -> Path:
    """Write ``report.json`` (a list of rows) into ``out`` and return its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
    return path
