"""Python and dispatch of a decode step: time, op calls and allocations per layer and token, for every policy.

    python bench/end_to_end/overhead.py [--layers 16] [--context 64] [--rounds 30] [--out FILE.json]

A Llama whose arithmetic is next to nothing (hidden size 64, 2 heads of 32, one token of context 64), so that what is
left is Python and dispatch. *step*: a wrapped model's forward of one token; *above DynamicCache*: that less an
unwrapped model's forward with DynamicCache in the same round; *above nothing*: that less a forward whose cache stores
nothing and whose attention hands back the query, so what is left is the model's own; all per layer. *generate*: the
step inside generate().
*calls*: ops of kvcache (and all ops, ours and torch's) per layer. *bytes*: what torch allocates in one step, and by how
much more in one behind four times the context, between two page boundaries; *host*: the peak of what Python and numpy
allocate in it, likewise. The bars (issue 5): at most 0.15 ms and 3 calls per layer, nothing that grows with the
context.

With two threads the step is timed by the clock; with one, the default, by its processor time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs its starts and stops

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import kvcache
from kvcache.attention import CACHE
from kvcache.evaluation.bench.caches import Context, filled
from kvcache.evaluation.bench.setting import pinned
from kvcache.evaluation.bench.shapes import Shape, build
from kvcache.evaluation.bench.timing import generate_tokens
from kvcache.evaluation.bench.turns import clock_name, line, timed_turns, write
from kvcache.evaluation.suite import share_weights

#: Contexts between which allocations are compared: neither at the edge of a page of 16, with the steps before.
SMALL, LARGE = 1001, 4009
STEPS = 12  # timed steps of a round


def policies(layers: int) -> list[str]:
    return [
        "full",
        "streamingllm(sinks=4, window=28)",
        "h2o(heavy=16, recent=16)",
        "tokenselect(k=16, sinks=4, local=8, chunk=8)",
        "tokenselect(k=16, sinks=4, local=8, reuse=2, chunk=8)",  # selects at every step
        f"skipdecode(min_layers={layers}, max_layers={layers}, horizon=64)",  # the schedule's cost, no layer left out
    ]


def small(layers: int) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return build(Shape("dispatch", "LlamaForCausalLM", {**sizes, **heads}, torch.float32), 8192)


class Nothing(DynamicCache):
    """A cache that stores nothing and has seen ``seen`` tokens."""

    seen = 0

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.seen


def hand_back(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention that costs nothing."""
    return query.transpose(1, 2), None


AttentionInterface.register("nothing", hand_back)
AttentionMaskInterface.register("nothing", lambda *args, **kwargs: None)


class Calls(TorchDispatchMode):
    """Counts op calls: ours and all."""

    ours = total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        self.ours += func.namespace == "kvcache"
        return func(*args, **(kwargs or {}))


def stepper(model: Any, cache: Any, token: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(token, **{CACHE: cache})

    return step


def calls(step: Callable[[], None], layers: int) -> tuple[float, float]:
    """Calls of kvcache's ops and of all ops, per layer."""
    with Calls() as counted:
        step()
    return counted.ours / layers, counted.total / layers


def allocated(step: Callable[[], None]) -> tuple[int, int]:
    """Bytes that torch's CPU allocator hands out during ``step``; peak bytes of Python's and numpy's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    torch_bytes = sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)
    tracemalloc.start()
    try:
        step()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        step()
        host = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return torch_bytes, host


def behind(model: Any, policy: str, length: int) -> Callable[[], None]:
    """A step of ``policy`` behind ``length`` tokens, after some that set it up."""
    context = Context.random(model, 1, length)
    step = stepper(model, filled(model, policy, context), context.sequence[:, -1:])
    for _ in range(2):
        step()
    return step


def rows(layers: int, length: int, rounds: int) -> list[dict[str, Any]]:
    plain = small(layers)
    wrapped = kvcache.wrap(share_weights(plain))
    context = Context.random(plain, 1, length)
    token = context.sequence[:, -1:]
    names = policies(layers)
    bare = share_weights(plain)
    bare.set_attn_implementation("nothing")
    steps: list[Callable[[], None]] = [lambda: None] * (len(names) + 2)

    def run(i: int) -> Callable[[], None]:
        def some() -> None:
            for _ in range(STEPS):
                steps[i]()

        return some

    def renew(i: int) -> Callable[[], None]:
        def make() -> None:
            if i == 0:
                nothing = Nothing(config=plain.config)
                nothing.seen = length
                steps[0] = stepper(bare, nothing, token)
            elif i == 1:
                steps[1] = stepper(plain, context.fill(DynamicCache(config=plain.config)), token)
            else:
                steps[i] = stepper(wrapped, filled(wrapped, names[i - 2], context), token)
            steps[i]()
            steps[i]()

        return make

    every = range(len(steps))
    spent = timed_turns([run(i) for i in every], rounds, before=[renew(i) for i in every])
    each = [[ms / STEPS / layers for ms in x] for x in spent]
    found = []
    for i, name in enumerate(["no cache, no attention", "DynamicCache + sdpa", *names]):
        row: dict[str, Any] = {"policy": name, "step ms": statistics.median(each[i])}
        if i:
            row["above nothing ms"] = statistics.median(a - b for a, b in zip(each[i], each[0]))
        if i > 1:
            ours, total = calls(behind(wrapped, name, SMALL), layers)
            few, host_few = allocated(behind(wrapped, name, SMALL))
            many, host_many = allocated(behind(wrapped, name, LARGE))
            row |= {
                "above DynamicCache ms": statistics.median(a - b for a, b in zip(each[i], each[1])),
                "generate ms": generated(wrapped, name, context) / layers,
                "our calls": ours,
                "all calls": total,
                "bytes": few,
                "bytes more at 4x": many - few,
                "host bytes": host_few,
                "host bytes more at 4x": host_many - host_few,
            }
        elif i == 1:
            row |= {"generate ms": generated(plain, None, context) / layers, "all calls": calls(steps[1], layers)[1]}
        else:
            row["all calls"] = calls(steps[0], layers)[1]
        found.append(row)
        print(line(row), flush=True)
    return found


def generated(model: Any, policy: str | None, context: Context) -> float:
    """Milliseconds per token inside ``generate``."""
    cache = context.fill(DynamicCache(config=model.config)) if policy is None else filled(model, policy, context)
    _, wall, cpu = generate_tokens(model, context.sequence, {CACHE: cache}, 24, disable_compile=True)
    return statistics.median(cpu if clock_name() == "cpu" else wall)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 16), ("context", 64), ("rounds", 30), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with pinned(options.threads == 1):
        write(options.out, vars(options), rows(options.layers, options.context, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
