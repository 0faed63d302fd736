"""SkipDecode on the clock: tokens per second at the paper's schedules against what the schedules promise.

    python bench/end_to_end/skipdecode.py [--model opt-101m] [--horizon 256] [--batch 4] [--out FILE.json]

The paper's tables for OPT-6.7B's 32 layers (arXiv 2307.02628): 2x runs 22 layers at position 0 and 11 from the horizon
on, 4x runs 11 and 6. *promise*: 32 over the mean of the layers that the timed positions run, which holds if a layer
skipped costs nothing and nothing but layers costs anything. Every contender generates the same positions, from a short
prompt to the horizon, in turns; the time of a round is its tokens' median. *x full*: time of the wrapped full cache
over this one's. Batch 1, and a batch whose rows are at different positions (prompts of different lengths, padded on the
left), whose schedules differ; there *promise* is what running a layer for all rows if one needs it would allow, and
*by rows* what running it only for those that need it would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvcache
from kvcache import KVCache
from kvcache.attention import CACHE
from kvcache.evaluation.bench.setting import pinned
from kvcache.evaluation.bench.shapes import build, shape_named
from kvcache.evaluation.bench.timing import generate_tokens
from kvcache.evaluation.bench.turns import clock_name, line, write
from kvcache.evaluation.suite import share_weights

#: (min_layers, max_layers) of the paper's tables for 32 layers, and the bars of issue 5: x full at batch 1.
TABLES = {"2x": (11, 22, 1.8), "3x": (6, 15, None), "4x": (6, 11, 3.2), "5x": (5, 8, None)}
PROMPT = 8


@dataclass
class Runner:
    """One contender on its way from the prompt to the horizon."""

    name: str
    model: PreTrainedModel
    policy: str | None
    sequence: Tensor
    mask: Tensor
    cache: Any = None

    def start(self) -> None:
        self.cache = DynamicCache(config=self.model.config) if self.policy is None else KVCache(self.model, self.policy)

    def round(self, tokens: int) -> float:
        """Median milliseconds of ``tokens`` tokens and two before them."""
        mask = torch.nn.functional.pad(self.mask, (0, self.sequence.shape[1] - self.mask.shape[1]), value=1)
        self.sequence, wall, cpu = generate_tokens(
            self.model, self.sequence, {CACHE: self.cache}, tokens, attention_mask=mask, disable_compile=True
        )
        return statistics.median(cpu if clock_name() == "cpu" else wall)


def ran(policy: Any, layers: int, positions: Tensor) -> tuple[float, float]:
    """Layers run at the steps ``positions`` [rows, T], mean: by at least one row; by a row, mean over rows."""
    active = policy.layers(layers, positions.int(), False)
    if active is None:
        return float(layers), float(layers)
    return float(active.any(1).sum(0).float().mean()), float(active.sum(0).float().mean())


def prompts(model: Any, rows: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Random ids and mask [rows, n], padded on the left: lengths from PROMPT to half of the horizon."""
    lengths = [PROMPT + (horizon // 2 - PROMPT) * r // max(rows - 1, 1) for r in range(rows)]
    width = max(lengths)
    ids = torch.randint(3, model.config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 0), mask.long()


def measure(o: argparse.Namespace, model: Any, wrapped: Any, batch: int) -> list[dict[str, Any]]:
    layers = model.config.num_hidden_layers
    names = {"full": "full"} | {
        t: f"skipdecode(min_layers={TABLES[t][0]}, max_layers={TABLES[t][1]}, horizon={o.horizon})" for t in o.table
    }
    ids, mask = prompts(model, batch, o.horizon)
    lengths = mask.sum(1)
    steps = (o.horizon - int(lengths.min())) // (o.tokens + 2)
    spent: dict[str, list[float]] = {}
    for repeat in range(o.repeats + 1):
        runners = [Runner("DynamicCache + sdpa", model, None, ids, mask)]
        runners += [Runner(name, wrapped, policy, ids, mask) for name, policy in names.items()]
        for x in runners:
            x.start()
        for s in range(steps if repeat else 1):
            turn = s % len(runners)
            for x in runners[turn:] + runners[:turn]:
                ms = x.round(o.tokens)
                if repeat:
                    spent.setdefault(x.name, []).append(ms)
    # Token t of round s stands at position length + s (tokens + 2) + 2 + t, of which the last is not yet fed.
    offsets = torch.cat([torch.arange(o.tokens) + s * (o.tokens + 2) + 1 for s in range(steps)])
    positions = lengths[:, None] + offsets
    found = []
    full = spent["full"]
    for name in ("DynamicCache + sdpa", *names):
        mine = spent[name]
        row: dict[str, Any] = {"table": name, "batch": batch, "ms/token": statistics.fmean(mine)}
        row["tokens/s"] = batch * 1e3 / row["ms/token"]
        if name in o.table:
            policy = kvcache.parse_policy(names[name])
            row["layers run"], by_rows = ran(policy, layers, positions)
            row["promise"] = layers / row["layers run"]
            row["by rows"] = layers / by_rows
        row["x full"] = sum(full) / sum(mine)
        row["lowest round"] = min(a / b for a, b in zip(full, mine))
        row["x DynamicCache"] = sum(spent["DynamicCache + sdpa"]) / sum(mine)
        if name in o.table and batch == 1:
            row["bar"] = TABLES[name][2]
        found.append(row)
        print(line(row), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-101m", help="a shape of 32 layers for the paper's tables (%(default)s)")
    parser.add_argument("--table", nargs="+", choices=tuple(TABLES), default=["2x", "4x"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    for name, default in (("horizon", 256), ("tokens", 29), ("repeats", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    with pinned(options.threads == 1):
        model = build(shape_named(options.model), 2 * options.horizon + 16)
        wrapped = kvcache.wrap(share_weights(model))
        for batch in options.batch:
            found += measure(options, model, wrapped, batch)
    write(options.out, vars(options), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
