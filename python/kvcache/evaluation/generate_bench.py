"""``kvcache bench``: decode time of ``generate()`` behind a long context, next to what the memory allows.

A Llama with 8 layers, hidden size 512, 8 query and 2 kv heads of 64, float32 and random weights. The context is read
once, with torch's attention; its keys and values then fill the cache of every contender (an evicting policy gets random
scores: the time of a step does not depend on which entries stay). Each round then lets every contender generate a few
tokens, in rotating order; the time of a token is the distance between two calls of ``generate``'s streamer, so it holds
everything that a user waits for. One process, one thread, one CPU; medians over all tokens; ratios per round. One
thread is timed by its processor time, which other work on the machine disturbs less; the wall time is reported too.

The limit of a step is (bytes of weights + bytes of keys and values that its attention reads) / read bandwidth, the
latter probed in the same run with the kernels' own streaming read.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from .. import _C
from ..attention import CACHE
from ..cache import KVCache
from ..policies import parse_policy
from ..report import human_bytes
from ..wrap import wrap
from .console import console, require_extras, table, ticking
from .rows import Row, machine, write_report
from .suite import entries_read, share_weights

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["build_llama", "default_policies", "read_bandwidth", "run"]

BASELINE = "DynamicCache + sdpa"
#: A step's share of the context that TokenSelect reads.
SELECTED = 1 / 8


def build_llama(context: int, seed: int = 0) -> LlamaForCausalLM:
    """The benchmark's model, random weights, for up to ``context`` tokens: 26.7 million parameters, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=context,
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def default_policies(context: int) -> list[str]:
    """Full, TokenSelect reading an eighth of the context, and H2O with the paper's 20 %."""
    budget = max(int(context * SELECTED), 8)
    sinks, local = min(16, budget // 4), budget // 4
    return [
        "full",
        f"tokenselect(k={budget - local - sinks}, sinks={sinks}, local={local})",
        "h2o(heavy=0.1, recent=0.1)",
    ]


def read_bandwidth(size: int = 256 << 20, repeats: int = 15) -> float:
    """Bytes per second that one thread reads from memory: best of ``repeats`` passes over ``size`` bytes."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    block = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        begin = clock()
        _C.probe_read(block.data_ptr(), size)
        best = min(best, clock() - begin)
    return size / best


class _Clock(BaseStreamer):
    """Notes when ``generate`` hands over each token: wall time and this thread's processor time, in seconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())

    def end(self) -> None: ...


@dataclass
class _Contender:
    """A model, its cache behind the context, and what its tokens took in each round, in milliseconds."""

    name: str
    model: PreTrainedModel
    cache: Any
    sequence: Tensor
    wall: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)

    def round(self, tokens: int) -> None:
        """Generate ``tokens`` timed tokens (and two untimed ones, in which ``generate`` sets itself up)."""
        clock = _Clock()
        with torch.inference_mode():
            self.sequence = self.model.generate(
                self.sequence,
                attention_mask=torch.ones_like(self.sequence),
                **{CACHE: self.cache},
                max_new_tokens=tokens + 2,
                do_sample=False,
                disable_compile=True,
                streamer=clock,
            )
        # put() gets the prompt, then every token; the first token's step includes the set-up.
        for mine, times in ((self.wall, clock.wall[2:]), (self.cpu, clock.cpu[2:])):
            mine.append([(b - a) * 1e3 for a, b in pairwise(times)])

    def median(self, rounds: list[list[float]]) -> float:
        return statistics.median(t for r in rounds for t in r)

    def ratio(self, base: _Contender, of: str) -> float:
        """Median over rounds of this contender's median against that of ``base`` in the same round."""
        pairs = zip(getattr(self, of), getattr(base, of))
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def _fill(wrapped: PreTrainedModel, policy: str, dense: DynamicCache, prompt: Tensor) -> KVCache:
    """A cache of ``policy`` that holds the context of ``dense``, evicted to its budget."""
    parsed = parse_policy(policy)
    if parsed.columns or parsed.schedules or parsed.positions != "original":  # what dense entries do not tell
        cache = KVCache(wrapped, policy)
        with torch.inference_mode():
            wrapped(prompt, **{CACHE: cache}, logits_to_keep=1)
        return cache
    full = KVCache(wrapped, "full")
    for i, layer in enumerate(dense.layers):
        full.update(layer.keys, layer.values, i)
    state = full.export_state()
    full.reset()
    for content in state["layers"]:
        content["columns"] = torch.rand(content["columns"].shape)
    cache = KVCache.import_state(wrapped, {**state, "policy": policy})
    cache.engine.unplanned = True  # as at the end of a prompt: fixes the budgets, then evicts
    cache.engine.settle()
    return cache


def _contenders(
    model: LlamaForCausalLM, context: int, policies: Sequence[str], room: int, seed: int, screen: Console
) -> list[_Contender]:
    prompt = torch.randint(1, 4096, (1, context), generator=torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    dense = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(prompt, **{CACHE: dense}, logits_to_keep=1).logits
    sequence = torch.cat([prompt, logits[:, -1].argmax(-1, keepdim=True)], 1)
    eager = share_weights(model)
    eager.set_attn_implementation("eager")
    wrapped = wrap(share_weights(model))
    copied = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=context + room)
    for i, layer in enumerate(dense.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), i)
        static.update(layer.keys, layer.values, i)
    found = [
        _Contender(BASELINE, model, dense, sequence),
        _Contender("DynamicCache + eager", eager, copied, sequence),
        _Contender("StaticCache + sdpa", model, static, sequence),
    ]
    found += [_Contender(p, wrapped, _fill(wrapped, p, dense, prompt), sequence) for p in policies]
    screen.print(f"[dim]{context:,} tokens of context read in {time.perf_counter() - began:.1f} s[/]")
    return found


def _weights_read(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step reads: all but the embedding table, of which it reads a row."""
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    return sum(p.nbytes for p in model.parameters() if tied or p is not embedding)


def _entry_bytes(model: PreTrainedModel) -> int:
    """Bytes of one entry in all layers and kv heads: key and value in the model's dtype."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def run(
    out: Path,
    *,
    contexts: Sequence[int] = (2048, 8192),
    rounds: int = 7,
    tokens: int = 16,
    threads: int = 1,
    policies: Sequence[str] = (),
    seed: int = 0,
) -> list[Row]:
    """Measure, print, and write ``report.json`` into ``out``; returns its rows."""
    require_extras()
    for policy in policies:
        parse_policy(policy)
    screen = console()
    torch.set_num_threads(threads)
    pinned = _pin() if threads == 1 else None
    bandwidth = read_bandwidth()
    facts = machine()
    screen.print(
        f"\n[bold]kvcache bench[/] · generate() on a Llama of 8 layers, hidden 512, 8/2 heads x 64, float32, batch 1\n"
        f"[dim]{facts['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
        f"{f' pinned to CPU {pinned}' if pinned is not None else ''}, {facts['backend']} kernels ({facts['isa']}); "
        f"{rounds} rounds of {tokens} tokens[/]\n"
    )
    rows: list[Row] = []
    for context in contexts:
        room = (rounds + 1) * (tokens + 2) + 1
        model = build_llama(context + room, seed)
        contenders = _contenders(model, context, policies or default_policies(context), room, seed, screen)
        with ticking(screen, (rounds + 1) * len(contenders)) as progress:
            for r in range(rounds + 1):
                progress.phase(f"{context:,} tokens, round {r} of {rounds}")
                turn = r % len(contenders)
                for c in contenders[turn:] + contenders[:turn]:
                    c.round(tokens)
                    progress.tick()
        for c in contenders:  # the first round warms up
            c.wall, c.cpu = c.wall[1:], c.cpu[1:]
        bandwidth = max(bandwidth, read_bandwidth())  # again: other work may have slowed the first probe
        found = [_row(c, contenders[0], context, model, bandwidth, rounds * tokens) for c in contenders]
        for row in found:
            row.extra |= {
                **{k: v for k, v in facts.items() if k != "backend"},
                "threads": threads,
                "read_gb_per_s": bandwidth / 1e9,
            }
        _show(screen, context, found, bandwidth)
        rows += found
        del contenders, model
    path = write_report(out, rows)
    screen.print(f"Written: {path}", markup=False, soft_wrap=True)
    return rows


def _row(c: _Contender, base: _Contender, context: int, model: PreTrainedModel, bandwidth: float, samples: int) -> Row:
    entry, ours = _entry_bytes(model), isinstance(c.cache, KVCache)
    read = entries_read(c.cache) if ours else float(c.sequence.shape[1])
    held = c.cache.nbytes if ours else _dense_bytes(c.cache)
    limit = (_weights_read(model) + read * entry) / bandwidth * 1e3
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    ms = c.median(getattr(c, clock))
    return Row(
        c.name,
        "generate",
        backend=machine()["backend"] if ours else "transformers",
        nbytes=held,
        full_nbytes=c.sequence.shape[1] * entry,
        read=read,
        ms_per_token=ms,
        ratio=c.ratio(base, clock),
        length=context,
        samples=samples,
        extra={
            "clock": clock,
            "wall_ms_per_token": c.median(c.wall),
            "wall_ratio": c.ratio(base, "wall"),
            "limit_ms": limit,
            "of_limit": limit / ms,
        },
    )


def _dense_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _show(screen: Console, context: int, rows: list[Row], bandwidth: float) -> None:
    screen.print(f"[bold]Decode behind {context:,} tokens of context[/]")
    grid = table(narrow=screen.width < 90)
    grid.add_column("Cache")
    for head in (
        "held",
        "ms/token",
        "ratio to\nDynamic",
        "wall\nms/token",
        "wall\nratio",
        "limit\nms",
        "% of\nlimit",
    ):
        grid.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        x = row.extra
        ours = row.backend != "transformers"
        grid.add_row(
            row.policy if ours else f"[dim]{row.policy}[/]",
            human_bytes(row.nbytes or 0),
            f"{row.ms_per_token:.1f}",
            f"{row.ratio:.2f}",
            f"{x['wall_ms_per_token']:.1f}",
            f"{x['wall_ratio']:.2f}",
            f"{x['limit_ms']:.1f}",
            f"{x['of_limit']:.0%}",
        )
    screen.print(grid)
    screen.print(
        "[dim]· ratio: below 1 is faster than DynamicCache + sdpa, median of paired rounds. "
        "ms/token is processor time of the one thread (wall time next to it).\n"
        f"· limit: weights and the keys and values that attention reads, at {bandwidth / 1e9:.1f} GB/s, "
        "probed in this run. TokenSelect also "
        "reads keys to vote, which its limit leaves out.[/]\n"
    )


def _pin() -> int | None:
    """Keep this process on one CPU; its number, or None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    return cpu
