"""Continuous batching: many ragged requests through one model, tokens per second and bytes of cache.

    python bench/end_to_end/batching.py [--requests 24] [--new 48] [--rows 8] [--threads 1] [--out FILE.json]

The same weights, prompts and run for all contenders: transformers' ``generate`` on batches padded on the left
(DynamicCache, sdpa), transformers' own ``generate_batch`` and ours under several policies. ``room`` is the number of
tokens that the pool may hold at once (empty: no limit): with a limit, a policy that keeps less runs more requests
together. *pool* is the most that pages in use held; *together* the most requests in one decode step. A contender that
fails is a row with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcache
from kvcache import batching
from kvcache.attention import CACHE
from kvcache.evaluation.rows import machine

MIB = 2**20
EVICTING = "h2o(heavy=0.125, recent=0.125)"


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts(requests: int, shortest: int, longest: int) -> list[list[int]]:
    """Random ids; lengths uniform in their logarithm."""
    random = torch.Generator().manual_seed(3)
    spread = torch.rand(requests, generator=random)
    lengths = (shortest * (longest / shortest) ** spread).int().tolist()
    return [torch.randint(3, 4096, (n,), generator=random).tolist() for n in lengths]


def padded(model: Any, prompts: list[list[int]], new: int, rows: int) -> dict[str, Any]:
    most = 0
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        width = max(map(len, part))
        ids, mask = (torch.zeros(len(part), width, dtype=torch.long) for _ in range(2))
        for row, prompt in enumerate(part):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
        most = max(most, sum(x.keys.nbytes + x.values.nbytes for x in cache.layers))
    return {"pool MiB": most / MIB, "together": rows}


def batched(model: Any, prompts: list[list[int]], new: int, rows: int) -> dict[str, Any]:
    """``generate_batch``, ours or transformers', whichever the model has."""
    peak = {"pool MiB": 0.0, "together": 0}
    step = batching.Scheduler.step

    def watched(self: batching.Scheduler) -> None:
        step(self)
        held = sum(s.pool.used * s.page_bytes for s in self.storages.values())
        peak["pool MiB"] = max(peak["pool MiB"], held / MIB)
        peak["together"] = max(peak["together"], 0 if self.running is None else len(self.running.requests))

    batching.Scheduler.step = watched  # type: ignore[method-assign]
    try:
        options = ContinuousBatchingConfig(max_requests_per_batch=rows, max_batch_tokens=1024)
        outputs = model.generate_batch(prompts, continuous_batching_config=options, max_new_tokens=new, do_sample=False)
    finally:
        batching.Scheduler.step = step  # type: ignore[method-assign]
    short = [x.error for x in outputs.values() if len(x.generated_tokens) != new]
    if short or len(outputs) != len(prompts):
        raise RuntimeError(f"{len(short)} requests did not finish: {short[:1]}")
    return peak if peak["together"] else {"pool MiB": None, "together": None}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 24), ("new", 48), ("rows", 8), ("threads", 1), ("longest", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the rows there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model, prompts = build(), make_prompts(options.requests, 32, options.longest)
    total = sum(map(len, prompts))
    small = options.longest + options.longest // 4  # little more than the longest needs
    contenders: list[tuple[str, str | None, int | None, Callable[..., dict[str, Any]]]] = [
        ("transformers generate, padded", None, None, padded),
        ("transformers generate_batch", None, None, batched),
        ("kvcache full", "full", None, batched),
        (f"kvcache {EVICTING}", EVICTING, None, batched),
        ("kvcache full", "full", small, batched),
        (f"kvcache {EVICTING}", EVICTING, small, batched),
    ]
    rows: list[dict[str, Any]] = []
    for name, policy, room, run in contenders:
        kvcache.unwrap(model)
        if policy is not None:
            kvcache.wrap(model, policy, max_tokens=room)
        row: dict[str, Any] = {"contender": name, "room": room}
        try:
            run(model, prompts[:2], 2, options.rows)  # what is loaded and compiled on first use
            start = time.perf_counter()
            found = run(model, prompts, options.new, options.rows)
            seconds = time.perf_counter() - start
            row |= {"s": seconds, "new tokens/s": options.requests * options.new / seconds, **found}
        except Exception as error:  # another library's failure is a result, too
            row["error"] = f"{type(error).__name__}: {error}"
        base = rows[0]["s"] if rows else row.get("s")
        row["x padded"] = base / row["s"] if "s" in row else None
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    settings = {**vars(options), "prompt tokens": total, "out": None}
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")
    return int(any("error" in x for x in rows if x["contender"].startswith("kvcache")))


if __name__ == "__main__":
    sys.exit(main())
