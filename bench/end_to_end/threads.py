"""Two threads against one: generate() behind a context, next to what two readers get out of the memory.

    python bench/end_to_end/threads.py [--model llama-27m] [--context 8192] [--batch 1 4] [--out FILE.json]

The same caches in turns with one thread and with several, timed by the clock. *memory* is how much faster as many
readers stream through memory than one, probed in the same run: what a step that waits for memory can gain at most. The
bar (issue 5): 1.7 where the memory allows it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvcache
from kvcache.evaluation.bench.caches import Context
from kvcache.evaluation.bench.contender import BASELINE, Contender, Ours, Transformers
from kvcache.evaluation.bench.limits import read_bandwidth
from kvcache.evaluation.bench.shapes import build, shape_named
from kvcache.evaluation.bench.turns import line, write
from kvcache.evaluation.suite import share_weights


def bandwidths(threads: int) -> tuple[float, float]:
    """Bytes per second of one reader and of ``threads``."""
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        found.append(read_bandwidth(repeats=7))
    return found[0], found[1]


def rows(o: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    model = build(shape_named(o.model), o.context + 2 * (o.rounds + 1) * (o.tokens + 2) + 1)
    wrapped = kvcache.wrap(share_weights(model))
    best = [0.0, 0.0]
    for batch in o.batch:
        best = [max(a, b) for a, b in zip(best, bandwidths(o.threads))]
        context = Context.random(model, batch, o.context)
        contenders: list[Contender] = [
            Transformers(BASELINE, context, model=model, factory=lambda room: DynamicCache(config=model.config)),
            *(Ours(p, context, model=wrapped, policy=p) for p in o.policy),
        ]
        for c in contenders:
            c.prepare()
        spent: dict[tuple[str, int], list[list[float]]] = {}
        for r in range(o.rounds + 1):
            for n in (1, o.threads) if r % 2 else (o.threads, 1):
                torch.set_num_threads(n)
                for c in contenders:
                    c.wall = []
                    c.round(o.tokens)
                    if r:
                        spent.setdefault((c.name, n), []).extend(c.wall)
        best = [max(a, b) for a, b in zip(best, bandwidths(o.threads))]
        for c in contenders:
            one, several = ([statistics.median(r) for r in spent[c.name, n]] for n in (1, o.threads))
            found.append(
                {
                    "contender": c.name,
                    "context": o.context,
                    "batch": batch,
                    "1 thread, ms": statistics.median(one),
                    f"{o.threads} threads, ms": statistics.median(several),
                    "x": statistics.median(a / b for a, b in zip(one, several)),
                    "memory x": best[1] / best[0],
                }
            )
            print(line(found[-1]), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-27m")
    parser.add_argument("--policy", nargs="+", default=["full", "tokenselect(k=752, sinks=16, local=256)", "h2o"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    for name, default in (("context", 8192), ("rounds", 6), ("tokens", 12), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    before = torch.get_num_threads()
    try:
        found = rows(options)
    finally:
        torch.set_num_threads(before)
    write(options.out, vars(options), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
