"""TokenSelect end to end: decoding behind a long context against the full cache, and prompts that grow.

    python bench/end_to_end/tokenselect.py decode  [--context 32768] [--k 512] [--out FILE.json]
    python bench/end_to_end/tokenselect.py prefill [--length 8192 16384 32768] [--full 16384] [--out FILE.json]

decode: generate() of a Llama of 8 layers (llama-27m) behind random entries, in turns with the full cache and
DynamicCache; k tokens voted for, with the paper's 128 sinks and 512 local ones. Its Selection Cache selects anew where
the query has turned (reuse 0.9); with random weights it turns at nearly every step. So also: at every step (reuse 2),
and only when the local window has passed (reuse -1), between which a trained model lies. And in two stages: pages by
their bounds first, then the tokens of the 256 best pages (shortlist). *selected*: the share of the steps of all layers
that selected. The bar (issue 5): 1.6 times faster than full at 32k.

prefill: the time to the first token of a small model (2 layers, hidden 256, 4/2 heads of 64), read chunk by chunk
(``prefill_chunk_size``), each chunk of 512 reading what it votes for; full attention up to ``--full`` tokens, whole and
by DynamicCache too. *x before*: time over that of the length before; a length twice as long takes twice as long where
the time grows linearly, four times where it grows with the square. *us/token* says the same.
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
from kvcache import KVCache
from kvcache.attention import CACHE
from kvcache.evaluation.bench.caches import Context
from kvcache.evaluation.bench.contender import BASELINE, Contender, Ours, Transformers
from kvcache.evaluation.bench.limits import read_bandwidth
from kvcache.evaluation.bench.setting import pinned
from kvcache.evaluation.bench.shapes import Shape, build, shape_named
from kvcache.evaluation.bench.timing import first_token
from kvcache.evaluation.bench.turns import clock_name, line, take_turns, write
from kvcache.evaluation.suite import share_weights

BAR = 1.6


def decode(o: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    room = (o.rounds + 1) * (o.tokens + 2) + 1
    model = build(shape_named(o.model), max(o.context) + room)
    wrapped = kvcache.wrap(share_weights(model))
    bandwidth = read_bandwidth()
    for length in o.context:
        context = Context.random(model, o.batch, length)
        policies = ["full", *(f"tokenselect(k={o.k}{x})" for x in ("", ", reuse=2", ", shortlist=256", ", reuse=-1"))]
        contenders: list[Contender] = [
            Transformers(BASELINE, context, model=model, factory=lambda room: DynamicCache(config=model.config)),
            *(Ours(p, context, model=wrapped, policy=p) for p in policies),
        ]
        for c in contenders:
            c.prepare()
        take_turns(contenders, o.rounds, o.tokens)
        bandwidth = max(bandwidth, read_bandwidth(repeats=5))
        clock, full = clock_name(), contenders[1]
        for c in contenders:
            c.finish()
            row: dict[str, Any] = {"cache": c.name, "context": length, "batch": o.batch, "ms/token": c.median(clock)}
            row["x full"] = 1 / c.ratio(full, clock)
            row["x DynamicCache"] = 1 / c.ratio(contenders[0], clock)
            row["read"] = c.kept
            row["limit ms"] = c.step_nbytes / bandwidth * 1e3
            if isinstance(c, Ours) and c.cache.policy.selects:
                report = c.cache.report().rows
                selections, reuses = (sum(r[name] for r in report) for name in ("selections", "reuses"))
                row["selected"] = selections / max(selections + reuses, 1)
                row["bar"] = BAR if length == 32768 and "reuse" not in c.name else None
            found.append(row)
            print(line(row), flush=True)
    return found


def small(length: int) -> Any:
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return build(Shape("prefill", "LlamaForCausalLM", {**sizes, **heads}, torch.float32), length + 8)


def prefill(o: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    model = small(max(o.length))
    wrapped = kvcache.wrap(share_weights(model))
    policy = f"tokenselect(k={o.k})"
    cases: list[tuple[str, Any, Any, int | None]] = [
        (policy, wrapped, lambda: KVCache(wrapped, policy), o.chunk),
        ("full", wrapped, lambda: KVCache(wrapped, "full"), None),
        (BASELINE, model, lambda: DynamicCache(config=model.config), None),
    ]
    ids = torch.randint(3, 512, (1, max(o.length)), generator=torch.Generator().manual_seed(1))
    for name, which, make, chunk in cases:
        before = None
        for length in o.length:
            if chunk is None and length > o.full:
                continue
            options = {} if chunk is None else {"prefill_chunk_size": chunk}
            seconds = []
            for attempt in range(o.rounds + 1):
                n = min(length, 1024) if attempt == 0 else length  # the first one warms up
                wall, cpu = first_token(which, ids[:, :n], {CACHE: make()}, disable_compile=True, **options)
                if attempt:
                    seconds.append(cpu if clock_name() == "cpu" else wall)
            taken = statistics.median(seconds)
            row: dict[str, Any] = {"cache": name, "length": length, "chunk": chunk, "s": taken}
            row["us/token"] = taken / length * 1e6
            row["x before"] = None if before is None else taken / before[1]
            row["x longer"] = None if before is None else length / before[0]
            before = (length, taken)
            found.append(row)
            print(line(row), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill"))
    parser.add_argument("--model", default="llama-27m", help="decode: the shape (%(default)s)")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768], help="decode")
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072], help="prefill")
    parser.add_argument("--full", type=int, default=16384, help="prefill: the longest for full attention")
    parser.add_argument("--rounds", type=int, help="decode: 6; prefill: 1")
    for name, default in (("k", 512), ("batch", 1), ("tokens", 10), ("chunk", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.rounds = options.rounds or (6 if options.what == "decode" else 1)
    with pinned(options.threads == 1):
        found = decode(options) if options.what == "decode" else prefill(options)
    write(options.out, vars(options), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
