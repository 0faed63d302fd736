"""What the kernel benchmarks share: honest timing, the machine's limits, tables and JSON.

* Everything that is compared runs in one process, in turns, on as many distinct copies as are needed to leave the
  second cache level cold; a figure is the median over all copies and rounds.
* One thread is timed by its CPU time, so that neighbours on the machine disturb less; several threads by the clock.
* ``% of limit`` is the time that memory and multipliers would need at least, max(bytes / bandwidth, flops / peak),
  over the time taken. Both limits are probed in the same rounds: bandwidth by streaming through the very same pools,
  front to back, and the peak by multiply-adds in registers (csrc/cpu/probe.inl).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kvcache import _C

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--cpu", type=int, help="pin to this core (one thread)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu is not None and options.threads == 1:
        os.sched_setaffinity(0, {options.cpu})
    return options


def seconds(run: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def compare(runs: dict[str, Callable[[int], object]], copies: int, rounds: int) -> dict[str, float]:
    """Median seconds of each ``run(copy)``. Each goes through all copies (slow ones: 3) before the next one's turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm up: pages of memory, lazy initialisation
        run(0)
    for i in range(rounds):
        order = list(runs)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            start = time.perf_counter()
            for c in range(copies):
                if c >= 3 and time.perf_counter() - start > 0.3:
                    break
                times[name].append(seconds(lambda c=c, name=name: runs[name](c)))
    return {name: median(x) for name, x in times.items()}


def copies_for(nbytes: int, total: int = 400 << 20) -> int:
    return max(3, min(48, total // nbytes))


def stream(*tensors: Tensor) -> None:
    for x in tensors:
        _C.probe_read(x.data_ptr(), x.nbytes)


def peak_flops() -> float:
    """Of one core, multiplied by the threads."""
    done = 0

    def run() -> None:
        nonlocal done
        done = _C.probe_fma(3_000_000)

    return max(done / seconds(run) for _ in range(5)) * torch.get_num_threads()


def paged(k: Tensor, v: Tensor, page_size: int = 16, shuffled: bool = False) -> tuple[Tensor, ...]:
    """k_pages, v_pages, table, counts, positions of dense [R, H, n, D] keys and values; n is a multiple of the page."""
    rows, heads, n, _ = k.shape
    width = n // page_size
    table = torch.arange(rows * heads * width, dtype=torch.int32)
    if shuffled:
        table = table[torch.randperm(len(table))]
    pools = []
    for x in (k, v):
        pool = torch.empty(len(table), page_size, x.shape[-1], dtype=x.dtype)
        pool[table.long()] = x.reshape(len(table), page_size, -1)
        pools.append(pool)
    counts = torch.full((rows, heads), n, dtype=torch.int32)
    positions = torch.arange(n, dtype=torch.int32).repeat(rows, heads, 1)
    return (*pools, table.view(rows, heads, width), counts, positions)


def report(rows: list[dict], columns: dict[str, str], options: argparse.Namespace) -> None:
    """Print the rows (column -> format) and write them with the machine's description."""
    lines = [list(columns)] + [[format(row[name], f) for name, f in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    if options.out:
        machine = {
            "cpu": platform.processor() or platform.machine(), "isa": _C.isa, "torch": torch.__version__,
            "threads": options.threads, "clock": "CPU time" if options.threads == 1 else "wall",
        }  # fmt: skip
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
