"""What the kernel benchmarks share: options, devices, honest timing, limits measured in the same run, tables and JSON.

    python bench/kernels/NAME.py [--device cpu|cuda|emulated] [--out FILE.json] [--quick | --full] [--seconds N]
                                 [--profile nsys|ncu] [--threads 1] [--cpu N]

Everything that is compared runs in one process, in turns, on several sets of inputs; a figure is the median.

* **cpu**: as many sets as leave the second cache level cold. One thread is timed by its CPU time, so that neighbours on
  the machine disturb less; several threads by the clock. The limits are a stream through the very same pools,
  front to back with four pages of memory at a time, and multiply-adds in registers (csrc/cpu/probe.inl), both in the
  same rounds.
* **cuda**: each contender is a CUDA graph that goes once through all sets, together more than five times the L2; the
  launch of a replay hides behind a kernel that sleeps. Where the inputs are too small for that, every call is a graph
  of its own behind a flush of the L2, and the row says "flushed". What cannot be captured is timed without a graph and
  says so. The limits are the best of torch's reductions over a large buffer and a large bfloat16 product of torch.
* **emulated**: the CUDA kernels on this machine's CPU (csrc/emulation), one small case, no times: it shows that a
  script runs. What ``--device cuda`` means without a GPU.

``% of limit`` is the time that memory and multipliers need at least, max(bytes / bandwidth, flops / peak), over the
time taken. ``--profile`` runs the first case, each contender in a range of its name, and prints the command around it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from devices import Bench, CudaBench, EmulatedBench, profile_command
from torch import Tensor

from kvcache import _C

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_INSTALLED = "not installed"


# --- inputs of several scripts ----------------------------------------------------------------------------------------


@dataclass
class Pages:
    """One layer's storage: full heads, pages in random order. ``in_order``: the table that makes the pools dense."""

    k: Tensor
    v: Tensor
    table: Tensor
    counts: Tensor
    positions: Tensor
    in_order: Tensor

    def args(self, in_order: bool = False) -> tuple[Tensor, ...]:
        return (self.k, self.v, self.in_order if in_order else self.table, self.counts, self.positions)

    @property
    def keys(self) -> tuple[Tensor, ...]:
        return (self.k, self.table, self.counts, self.positions)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, n, D] as the table in order has them; the pools' own memory."""
        rows, heads, width = self.table.shape
        size = self.k.shape[1]
        return tuple(x.view(rows, heads, width * size, x.shape[2]) for x in (self.k, self.v))  # type: ignore[return-value]


def pages_of(
    bench: Bench, rows: int, heads: int, n: int, dim: int, dtype: torch.dtype, *, page_size: int = 16
) -> Pages:
    """n entries, a multiple of the page, in each head."""
    width = n // page_size
    count = rows * heads * width
    order = torch.randperm(count, device=bench.device).int()
    counts = torch.full((rows, heads), n, dtype=torch.int32, device=bench.device)
    positions = torch.arange(n, dtype=torch.int32, device=bench.device).repeat(rows, heads, 1)
    return Pages(
        bench.randn(count, page_size, dim, dtype=dtype), bench.randn(count, page_size, dim, dtype=dtype),
        order.view(rows, heads, width), counts, positions,
        torch.arange(count, dtype=torch.int32, device=bench.device).view(rows, heads, width),
    )  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- running a script -------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "emulated"))
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--seconds", type=float, help="begin no more cases after this long (GPU: 60 unless --full)")
    parser.add_argument("--profile", choices=("nsys", "ncu"), help="run the first case for a profiler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", type=int, help="pin to this core (one thread)")
    options = parser.parse_args()
    usable = torch.cuda.is_available() and _C.cuda_info()["compiled"]
    options.device = options.device or ("cuda" if usable else "cpu")
    if options.device == "cuda" and not usable:
        print("No GPU here, or kvcache was built without nvcc: one small case under emulation.", flush=True)
        options.device = "emulated"
    torch.set_num_threads(options.threads)
    if options.cpu is not None and options.threads == 1:
        os.sched_setaffinity(0, {options.cpu})
    return options


def main(
    description: str | None, shapes: Callable[[Bench], list[tuple]], measure: Callable[..., Iterable[dict]]
) -> None:
    """Measure all ``shapes(bench)``; each ``measure(bench, *shape)`` gives some rows."""
    options = arguments(description)
    if options.profile and options.device != "cuda":
        print(f"On a machine with a GPU: {profile_command(options.profile)}")
        return
    bench = {"cpu": Bench, "cuda": CudaBench, "emulated": EmulatedBench}[options.device](options)
    limit = options.seconds or (60 if bench.kind == "cuda" and not options.full else float("inf"))
    rows: list[dict[str, Any]] = []
    for shape in shapes(bench):
        if time.monotonic() - bench.started > limit:
            print(f"left out, the time was up: {shape}", flush=True)
            continue
        rows += measure(bench, *shape)
        if options.out:  # after every case: whoever stops the script keeps what it has
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"machine": bench.machine(), "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{name}: {number(value)}" for name, value in bench.machine().items()))
    table(rows)


def number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(rows: list[dict[str, Any]]) -> None:
    head = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "all"]
    lines = [head] + [[number(row.get(name)) for name in head] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
