"""KVzip: a context is compressed once, for whatever will be asked, to what repeating it would read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import ops
from .attention import cache_argument, parameters_of
from .cache import KVCache
from .layer_state import LayerView
from .layers import wrapped_state
from .policies.adakv import share_out
from .policies.base import Policy
from .policies.budget import FAR, check_budget, check_count, resolve_budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .store import PageStorage

#: Most attention probabilities that are held at once.
AT_ONCE = 2**24


@dataclass(frozen=True)
class _Replay(Policy):
    """Keeps everything; notes what the queries of a forward behind a ``context`` give to its entries in slots ``first``
    to ``end`` - 1."""

    context: int
    first: int
    end: int
    wanted: frozenset[int]
    given: dict[int, Tensor] = field(default_factory=dict)  # layer -> [heads, entries], the largest probability

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        if layer.index not in self.wanted:
            return
        keys, tokens = layer.keys()[0].float(), queries.shape[2]
        keys = torch.cat([keys[:, self.first : self.end], keys[:, self.context : self.context + tokens]], 1)
        q = queries[0].float().unflatten(0, (layer.heads, -1)) * layer.scale
        place = torch.arange(keys.shape[1], device=keys.device) - (self.end - self.first)
        most = keys.new_zeros(layer.heads, self.end - self.first)
        for part in torch.arange(tokens, device=keys.device).split(max(AT_ONCE // (queries.shape[1] * len(place)), 1)):
            logits = q[:, :, part] @ keys[:, None].transpose(2, 3)
            p = logits.masked_fill(place > part[:, None], float("-inf")).softmax(-1)
            most = torch.maximum(most, p[..., : self.end - self.first].amax((1, 2)))
        self.given[layer.index] = most


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: Tensor,
    keep: int | float | str = 0.3,
    *,
    repeat: Tensor | None = None,
    chunk: int = 2048,
    lead: int = 8,
) -> None:
    """Evict from ``cache``, which holds a context, what the model would not read to repeat it; in place (KVzip, arXiv
    2505.23416, section 3).

    The context is replayed chunk by chunk, behind an instruction to repeat it. The score of an entry is the largest
    attention probability that any query of the replay of its chunk gives to it, over the query heads of its kv head, in
    a softmax over the entries of the chunk and the replay itself. The best entries of all heads of all layers together
    stay, at least one of each head; the pages of the others are freed. What is read afterwards (questions, answers)
    stays whole. Costs about one more reading of the context.

    Arguments
        model: the wrapped model of the cache.
        cache: under a policy that keeps and reads everything (``full``), with all of ``input_ids`` in it and nothing
            evicted. Forks are not touched: pages that are shared are copied.
        input_ids: int64 [rows, columns], what the cache has seen, padding included.
        keep: entries per kv head, the mean over all heads and layers without a sliding window: an int, a share of the
            context of each row, or bytes of the cache. Layers with a sliding window keep their window.
        repeat: int64 [tokens], an instruction such as "Repeat the previous context exactly:" in tokens; None: none.
        chunk: tokens of the context that are replayed at once (paper: 2048).
        lead: tokens before a chunk that are replayed with it and say where it starts (official code: 8).

    Raises TypeError or ValueError, with nothing changed, for other arguments, models (latent attention, recurrent
    layers, tensor-parallel ranks) and caches; OutOfPages, likewise, where ``max_tokens`` leaves no room.
    """
    _check(model, cache, input_ids, keep, repeat, chunk, lead)
    layers = [x for x in cache.engine.layers if x.window is None]
    lengths, real = cache.engine.tokens.tolist(), cache.engine.real
    decoder = model.base_model
    names = parameters_of(type(decoder).forward)
    scores: list[Tensor] = []  # of each row [layers * heads, entries]
    for row, length in enumerate(lengths):
        text = input_ids[row] if real is None else input_ids[row][real[row].to(input_ids.device)]
        parts = []
        for first in range(0, length, chunk):
            end = min(first + chunk, length)
            replayed = (
                [text[max(first - lead, 0) : end]] if repeat is None else [repeat, text[max(first - lead, 0) : end]]
            )
            replay = _Replay(length, first, end, frozenset(x.index for x in layers))
            fork = cache.fork()
            fork.batch_select_indices(torch.tensor([row]))
            fork.engine.policy = replay
            ids = torch.cat([x.to(model.device) for x in replayed])[None]
            given: dict[str, Any] = {cache_argument(names): fork}
            if "position_ids" in names:
                given["position_ids"] = torch.arange(length, length + ids.shape[1], device=model.device)[None]
            decoder(input_ids=ids, **given)
            parts.append(torch.cat([replay.given[x.index].cpu() for x in layers]))
        scores.append(torch.cat(parts, 1))
    width = max(lengths)
    together = torch.stack([pad(x, (0, width - x.shape[1]), value=float("-inf")) for x in scores])
    bytes_per_token = layers[0].view().bytes_per_token
    means = torch.tensor([max(resolve_budget(keep, n, bytes_per_token), 1) for n in lengths])
    counts = share_out(together, means * together.shape[1], torch.ones_like(means))
    stores = [x.store for x in layers if x.store is not None]
    heads = [store.heads for store in stores]
    needed: dict[PageStorage, int] = {}
    chosen = []
    for store, of_layer, kept in zip(stores, together.split(heads, 1), counts.split(heads, 1)):
        none = torch.zeros(len(lengths), dtype=torch.int32, device=store.counts.device)
        of_slot = pad(of_layer, (0, store.capacity - width)).to(none.device)
        far, k = torch.full_like(none, FAR), kept.to(none.device)
        chosen.append(ops.topk(of_slot, store.counts, store.positions, k, none, far, int(kept.max())))
        if store.shared:
            pages = int((-(-kept // store.storage.page_size)).sum())
            needed[store.storage] = needed.get(store.storage, 0) + pages
    for storage, pages in needed.items():
        storage.reserve(pages)
    for layer, store, (index, index_counts) in zip(layers, stores, chosen):
        before = int(store.counts_host.sum())
        store.keep(index, index_counts)
        layer.count("evictions", before - int(store.counts_host.sum()))
    for storage in cache.engine.storages.values():
        storage.trim()


def _check(
    model: PreTrainedModel, cache: KVCache, ids: Tensor, keep: object, repeat: Tensor | None, chunk: int, lead: int
) -> None:
    name, state = type(model).__name__, wrapped_state(model)
    if state is None:
        raise ValueError(f"{name} is not wrapped: call kvcache.wrap(model, ...) first")
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a kvcache.KVCache, got {type(cache).__name__}")
    check_budget("keep", keep)
    check_count("chunk", chunk, 1)
    check_count("lead", lead)
    engine, policy = cache.engine, cache.policy
    if policy.retains or policy.selects or policy.schedules:
        raise ValueError(f"cache must be under a policy that keeps and reads everything, not {policy}")
    if set(state.tiers.values()) != {"handle"} or state.parallel is not None:
        raise ValueError(f"{name} has layers without queries and keys of their own, or shares them with other ranks")
    if engine.recording or engine.step is not None or engine.unplanned or not engine.seen:
        raise ValueError("cache must hold a complete context, with nothing to accept")
    if not isinstance(ids, Tensor) or ids.shape != (len(engine.tokens), engine.seen) or ids.is_floating_point():
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"input_ids must be the token ids [{len(engine.tokens)}, {engine.seen}] in the cache, got {got}"
        )
    if repeat is not None and (not isinstance(repeat, Tensor) or repeat.ndim != 1 or repeat.is_floating_point()):
        raise ValueError("repeat must be token ids [tokens], or None")
    full = [x for x in engine.layers if x.window is None]
    if not full:
        raise ValueError(f"{name} has no layer without a sliding window: there is nothing to compress")
    for layer in full:
        if layer.store is None or (layer.store.counts_host != engine.tokens.numpy()[:, None]).any():
            raise ValueError(f"cache must hold every token of the context, but layer {layer.index} does not")
