"""H2O's three claims (arXiv 2306.14048) as one bench: the batch that fits, throughput at it, latency at the same batch.

    python bench/end_to_end/h2o.py [--model opt-27m] [--prompt 1024] [--new 64] [--full-rows 4] [--out FILE.json]

Memory for keys and values is fixed at what ``--full-rows`` sequences of prompt and answer take in a full cache.

1. *batch*: the most requests that ``generate_batch`` decodes together when its pool may hold no more than that
   (``max_tokens``); H2O keeps 20 % of the prompt. For DynamicCache: the sequences whose tensors fit.
2. *all s*, *all tokens/s*: that batch from prompts to answers (``generate_batch``; ``generate`` for DynamicCache), as
   the paper counts throughput; *decode tokens/s*: of its decode steps alone, behind random entries, in turns.
3. *ms/step*: at the batch that fits the full cache ("same batch"), and at each cache's own. *x full*: decode tokens/s
   against the full cache's.

*pool MiB*: the most that pages in use held, before evicting. The bar (issue 5, on a GPU): 4.5 times the batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, DynamicCache

import kvcache
from kvcache import batching
from kvcache.attention import CACHE
from kvcache.engine import Engine
from kvcache.evaluation.bench.caches import Context
from kvcache.evaluation.bench.contender import BASELINE, Contender, Ours, Transformers
from kvcache.evaluation.bench.limits import entry_bytes
from kvcache.evaluation.bench.setting import pinned
from kvcache.evaluation.bench.shapes import build, shape_named
from kvcache.evaluation.bench.turns import clock_name, line, take_turns, write
from kvcache.evaluation.suite import share_weights

MIB = 2**20
PAGE = 16
H2O = "h2o(heavy=0.1, recent=0.1)"


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.thread_time if clock_name() == "cpu" else time.perf_counter
    begin = clock()
    found = action()
    return clock() - begin, found


def together(model: Any, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Run ``generate_batch``; the most requests in one decode step, and the most bytes that pages in use held."""
    peak = {"rows": 0, "nbytes": 0}
    decode, finish = batching.Scheduler._decode, Engine.finish

    def counted(self: batching.Scheduler, running: batching.Rows) -> None:
        peak["rows"] = max(peak["rows"], len(running.requests))
        decode(self, running)

    def watched(self: Engine) -> None:  # before it evicts
        peak["nbytes"] = max(peak["nbytes"], sum(s.pool.used * s.page_bytes for s in self.storages.values()))
        finish(self)

    batching.Scheduler._decode, Engine.finish = counted, watched  # type: ignore[method-assign]
    try:
        options = ContinuousBatchingConfig(max_requests_per_batch=len(prompts), max_batch_tokens=len(prompts[0]))
        outputs = model.generate_batch(prompts, continuous_batching_config=options, max_new_tokens=new, do_sample=False)
    finally:
        batching.Scheduler._decode, Engine.finish = decode, finish  # type: ignore[method-assign]
    short = [x.error for x in outputs.values() if len(x.generated_tokens) != new]
    if short:
        raise RuntimeError(f"{len(short)} requests did not finish: {short[:1]}")
    return peak


def measure(o: argparse.Namespace) -> list[dict[str, Any]]:
    total = -(-(o.prompt + o.new) // PAGE) * PAGE  # a page is filled or not, in every cache
    room = o.full_rows * total
    grows = (o.rounds + 1) * (o.tokens + 2) + 1
    model = build(shape_named(o.model), max(total, o.prompt + grows) + 2, device=o.device)
    token = entry_bytes(model)
    print(f"{o.model}: memory for {room:,} tokens, {room * token / MIB:.0f} MiB", flush=True)
    ids = torch.randint(3, model.config.vocab_size, (4096, o.prompt), generator=torch.Generator().manual_seed(1))

    def prompts(n: int) -> list[list[int]]:
        return ids[:n].tolist()

    found: dict[str, dict[str, Any]] = {}
    sharing = share_weights(model)
    for policy, kept in (("full", total), (H2O, int(0.1 * o.prompt) * 2)):
        kvcache.unwrap(sharing)
        kvcache.wrap(sharing, policy, max_tokens=room)
        together(sharing, prompts(1), 2)  # what is loaded on first use
        tries = min(room // kept + 2, o.new)  # more than can fit
        batch = int(together(sharing, prompts(tries), o.new)["rows"])
        spent, peak = seconds(lambda n=batch: together(sharing, prompts(n), o.new))  # type: ignore[misc]
        found[policy] = {"batch": batch, "all s": spent, "pool MiB": peak["nbytes"] / MIB}
    rows = room // total

    def dense() -> None:
        batch = ids[:rows].to(o.device)
        cache = DynamicCache(config=model.config)
        model.generate(batch, attention_mask=torch.ones_like(batch), **{CACHE: cache}, max_new_tokens=o.new,
                       do_sample=False)  # fmt: skip

    spent, _ = seconds(dense)
    found[BASELINE] = {"batch": rows, "all s": spent, "pool MiB": rows * total * token / MIB}

    # Decode steps alone: at the full cache's batch, and H2O at its own.
    wrapped = kvcache.wrap(share_weights(model))
    same = found["full"]["batch"]
    context = Context.random(model, same, o.prompt)
    contenders: list[Contender] = [
        Transformers(BASELINE, context, model=model, factory=lambda room: DynamicCache(config=model.config)),
        Ours("full", context, model=wrapped, policy="full"),
        Ours(H2O, context, model=wrapped, policy=H2O),
    ]
    larger = found[H2O]["batch"]
    if larger != same:
        contenders.append(Ours("own batch", Context.random(model, larger, o.prompt), model=wrapped, policy=H2O))
    for c in contenders:
        c.prepare()
    take_turns(contenders, o.rounds, o.tokens)
    clock, full = ("wall" if o.device != "cpu" else clock_name()), contenders[1]
    reported = []
    for c in contenders:
        own = c.name == "own batch"
        name, batch = (H2O, larger) if own else (c.name, same)
        row: dict[str, Any] = {"cache": name, "batch": batch, "largest batch": found[name]["batch"]}
        row["x batch"] = found[name]["batch"] / found["full"]["batch"]
        row["ms/step"] = c.median(clock)
        row["decode tokens/s"] = batch * 1e3 / row["ms/step"]
        row["x full"] = batch / same / c.ratio(full, clock)
        if batch == found[name]["batch"]:
            row |= {k: found[name][k] for k in ("all s", "pool MiB")}
            row["all tokens/s"] = batch * o.new / row["all s"]
        reported.append(row)
        print(line(row), flush=True)
    return reported


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-27m", help="a shape (%(default)s)")
    parser.add_argument("--device", default="cpu")
    numbers = (("prompt", 1024), ("new", 64), ("full-rows", 4), ("rounds", 5), ("tokens", 8), ("threads", 1))
    for name, default in numbers:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with pinned(options.threads == 1 and options.device == "cpu"):
        found = measure(options)
    write(options.out, vars(options), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
