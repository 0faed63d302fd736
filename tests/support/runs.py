"""Teacher-forced runs of a wrapped model, with a log of what every head kept between the steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import kvcache

Kept = list[list[list[int]]]  # layer -> kv head -> positions


def kept(cache: kvcache.KVCache, row: int = 0) -> Kept:
    """What every head of ``row`` holds now."""
    out = []
    for layer in range(len(cache.layers)):
        heads = cache.kept(layer).shape[1]
        out.append([cache.positions(layer, row, h).tolist() for h in range(heads)])
    return out


@dataclass
class Run:
    """``logits`` [rows, tokens, vocabulary]; ``log[t][row]``: kept before the token in column t was read."""

    logits: Tensor
    cache: kvcache.KVCache
    log: dict[int, list[Kept]] = field(default_factory=dict)


@torch.no_grad()
def run(model, tokens: Tensor, prompt: int, mask: Tensor | None = None, chunks=None, cache=None) -> Run:
    """Read ``tokens`` [rows, T]: the first ``prompt`` columns at once (or in ``chunks``), the others one by one."""
    cache = kvcache.KVCache(model) if cache is None else cache
    rows, total = tokens.shape
    ends = [prompt] if chunks is None else [*torch.tensor(chunks).cumsum(0).tolist()]
    assert ends[-1] == prompt
    if len(ends) > 1:  # what generate() says when prefill_chunk_size is set
        cache.engine.prompt_length = prompt
    ends += range(prompt + 1, total + 1)
    out, log, start = [], {}, 0
    for end in ends:
        if start >= prompt:
            log[start] = [kept(cache, r) for r in range(rows)]
        now = None if mask is None else mask[:, :end]
        extra = {}
        if mask is not None:
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
            extra = {"position_ids": places[:, start:end], "attention_mask": now}
        out.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True, **extra).logits)
        start = end
    log[total] = [kept(cache, r) for r in range(rows)]
    return Run(torch.cat(out, 1), cache, log)


def own_log(result: Run, row: int = 0) -> dict[int, Kept]:
    """The log of one row alone, for :class:`support.dense.Replay`."""
    return {t: kept_[row] for t, kept_ in result.log.items()}
