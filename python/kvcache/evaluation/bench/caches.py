"""Caches that hold a context, without reading it: random keys and values of the model's shape.

The time of a decode step depends on how many entries there are, not on what is in them; so one layer's random keys and
values fill every layer of every contender. A policy whose memory of the prompt is more than entries and scores reads a
prompt instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention import CACHE
from ...cache import KVCache
from ...policies import parse_policy
from .limits import kv_heads

__all__ = ["Context", "filled", "needs_prompt"]


@dataclass
class Context:
    """``rows`` contexts of ``length`` tokens for ``model``: ids [rows, length + 1] and one layer's entries."""

    model: PreTrainedModel
    rows: int
    length: int
    sequence: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> Context:
        heads, dim = kv_heads(model)
        random = torch.Generator(model.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": random, "device": model.device}
        vocabulary = model.config.vocab_size
        sequence = torch.randint(1, vocabulary, (rows, length + 1), **options)
        k, v = (torch.randn(rows, heads, length, dim, dtype=model.dtype, **options) for _ in range(2))
        return cls(model, rows, length, sequence, k, v)

    @property
    def prompt(self) -> Tensor:
        """The ids that the cache holds, [rows, length]."""
        return self.sequence[:, :-1]

    def fill(self, cache: Any) -> Any:
        """The same entries in every layer of one of transformers' caches."""
        for i in range(self.model.config.num_hidden_layers):
            cache.update(self.keys, self.values, i)
        return cache


def needs_prompt(policy: str, layers: int) -> bool:
    """Whether entries and scores are not all that ``policy`` keeps of a prompt."""
    parsed = parse_policy(policy)
    # A prompt that skips layers leaves them without entries.
    partial = parsed.schedules and parsed.layers(layers, torch.zeros(1, 1, dtype=torch.int32), True) is not None
    return bool(parsed.columns) or parsed.positions != "original" or partial or parsed.routes


class _SameLayers(Sequence):
    """The layers of an exported state, all with the same entries but scores of their own; made when asked for.

    Before the second layer the pool is grown for all of them at once: growing by doubling would copy it.
    """

    def __init__(self, cache: KVCache, layers: list[dict[str, Any]], context: Context) -> None:
        self.cache, self.layers, self.context = cache, layers, context

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("layers are made in order, by iteration")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        c = self.context
        rows, heads, n = c.keys.shape[:3]
        positions = torch.arange(n, dtype=torch.int32, device=c.keys.device).expand(rows, heads, n)
        for i, layer in enumerate(self.layers):
            if i == 1:
                for storage in self.cache.engine.storages.values():
                    storage.reserve((len(self.layers) - 1) * storage.pool.used)
            columns = layer["columns"]
            yield {
                **layer,
                "keys": c.keys,
                "values": c.values,
                "counts": torch.full_like(layer["counts"], n),
                "positions": positions,
                "columns": torch.rand(*columns.shape[:-1], n, device=columns.device),
                "budgets": None,
                "recent": None,
            }


@torch.no_grad()
def filled(wrapped: PreTrainedModel, policy: str, context: Context, **options: Any) -> KVCache:
    """A cache of ``policy`` behind ``context``, evicted to its budget as at the end of a prompt."""
    layers = wrapped.config.num_hidden_layers
    if needs_prompt(policy, layers):
        cache = KVCache(wrapped, policy, **options)
        wrapped(context.prompt, **{CACHE: cache}, logits_to_keep=1)
        return cache
    # One token tells the form of a state; the entries are put in its place.
    small = KVCache(wrapped, "full", **options)
    for i in range(layers):
        small.update(context.keys[:, :, :1], context.values[:, :, :1], i)
    state = small.export_state()
    small.reset()
    cache = KVCache(wrapped, policy, **options)
    tokens = torch.full_like(state["tokens"], context.length)
    state |= {"seen": context.length, "tokens": tokens, "prompt_tokens": tokens, "unplanned": True}
    cache._model_dtype_size = state["dtype_size"]
    cache.engine.import_state({**state, "layers": _SameLayers(cache, state["layers"], context)}, wrapped.device)
    cache.engine.settle()  # as at the end of a prompt: fixes the budgets, then evicts
    return cache
