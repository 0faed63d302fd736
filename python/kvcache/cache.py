"""KVCache: the transformers cache whose entries live in pages and follow a policy."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import current_frame, no_grad
from .cache_layers import is_stateful, make_layer
from .compiling import uncompiled
from .decode_graph import DecodeGraphs
from .engine import Engine
from .layer_state import HANDLE, Layer
from .layers import wrapped_state
from .policies import Policy, compose, parse_policy
from .report import Report
from .self_attending import dense_columns
from .step import Step
from .store import STORAGE_DTYPES
from .tiers import LayerPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_MODES = ("whole", "chunked")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES |= {str(d).removeprefix("torch."): d for d in STORAGE_DTYPES}


def resolve_policy(policy: Policy | str) -> Policy:
    """A policy from a policy or its text form; TypeError for anything else."""
    if isinstance(policy, str):
        return parse_policy(policy)
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a kvcache.Policy or its text form, got {policy!r}")
    return compose(policy)


def check_prefill(policy: Policy, prefill: str) -> None:
    """ValueError if ``policy`` needs prompts whole, which ``prefill="chunked"`` is not for."""
    if policy.routes and prefill == "chunked":
        raise ValueError(f"{policy} needs prompts at once, but prefill='chunked' evicts from them chunk by chunk")


def check_options(page_size: object, kv_dtype: object, max_tokens: object, prefill: object) -> torch.dtype | None:
    """Raise TypeError or ValueError naming the bad option; returns the storage dtype (None: the model's)."""
    for name, value in (("page_size", page_size), ("max_tokens", max_tokens)):
        if value is None and name == "max_tokens":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if prefill not in PREFILL_MODES:
        raise ValueError(f"prefill must be one of {PREFILL_MODES}, got {prefill!r}")
    if kv_dtype == "auto":
        return None
    dtype = _DTYPES.get(kv_dtype) if isinstance(kv_dtype, str) else kv_dtype
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"kv_dtype must be 'auto', one of {sorted(_DTYPES)} or the torch dtype, got {kv_dtype!r}")
    return dtype


class KVCache(Cache):
    """A paged, policy-driven cache for a wrapped model; ``generate`` makes one, or takes it as ``past_key_values``
    (since transformers 5.24 also as ``cache``).

    Arguments
        model: a model that :func:`kvcache.wrap` has wrapped.
        policy, page_size, kv_dtype, max_tokens, prefill: as for :func:`kvcache.wrap`; what is left out is what ``wrap``
            got.

    Raises ValueError when the model is not wrapped and everything that ``wrap`` raises for bad options.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | str | None = None,
        *,
        page_size: int | None = None,
        kv_dtype: str | torch.dtype | None = None,
        max_tokens: int | None = None,
        prefill: str | None = None,
    ) -> None:
        state = wrapped_state(model)
        if state is None:
            raise ValueError(f"{type(model).__name__} is not wrapped: call kvcache.wrap(model, ...) first")
        resolved = state.policy if policy is None else resolve_policy(policy)
        resolved.check(len(state.windows))
        page_size = state.page_size if page_size is None else page_size
        max_tokens = state.max_tokens if max_tokens is None else max_tokens
        prefill = state.prefill if prefill is None else prefill
        dtype = check_options(page_size, state.kv_dtype if kv_dtype is None else kv_dtype, max_tokens, prefill)
        check_prefill(resolved, prefill)
        state.check_policy(model, resolved)
        state.route(model, resolved)
        turns = resolved.selects or resolved.observes or resolved.merges_keys or resolved.relocates
        rotation = state.rotation(model) if turns else None
        self._adopt(
            Engine(
                resolved,
                state.windows,
                page_size=page_size,
                kv_dtype=dtype,
                max_tokens=max_tokens,
                rotation=rotation,
                projections=state.projections(model, resolved),
                parallel=state.parallel,
                prefill=prefill,
            ),
            state.plan,
            state.captures(model),
        )

    def _adopt(self, engine: Engine, plan: LayerPlan, captures: bool) -> None:
        self.engine, self._plan = engine, plan
        self._model_dtype_size = 0
        self._broken = False
        self.graphs = DecodeGraphs() if captures else None
        for layer in engine.layers:
            tier = plan.tiers[layer.index]
            layer.paged = tier != "own"
            if tier in ("pre-hook", "materialised") and layer.index not in plan.absorbed:
                layer.expands = tier
        super().__init__(layers=[make_layer(self, plan, x.index, x.window) for x in engine.layers])

    # -- what it holds ----------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def seen_tokens(self) -> int:
        """Columns seen so far, padding included: what positions, masks and ``get_seq_length`` speak of."""
        return self.engine.seen

    def kept(self, layer: int) -> Tensor:
        """Entries held by ``layer``: LongTensor [rows, kv_heads]."""
        store = self._layer(layer).store
        return torch.zeros(0, 0, dtype=torch.long) if store is None else torch.from_numpy(store.counts_host).long()

    def positions(self, layer: int, row: int, kv_head: int) -> Tensor:
        """Positions kept by one head, ascending: LongTensor. Position p is the p-th real token of the row, from 0."""
        store = self._layer(layer).store
        if store is None:
            return torch.zeros(0, dtype=torch.long)
        return store.positions[row, kv_head, : int(store.counts_host[row, kv_head])].long().sort().values.cpu()

    def tier(self, layer: int) -> str | None:
        """How ``layer`` gets at its entries: see ``tiers.py``."""
        return self._plan.tiers.get(layer)

    def _layer(self, index: int) -> Layer:
        if not -len(self.layers) <= index < len(self.layers):
            raise IndexError(f"layer {index} does not exist: the cache has {len(self.layers)} layers")
        return self.engine.layers[index]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that this cache holds, keys and values; a page shared by several rows counts once."""
        return sum(n for _, n in self._pages_held().values())

    def _pages_held(self) -> dict[int, tuple[int, int]]:
        """Layer -> (pages in its tables, bytes of those not counted for an earlier layer or row)."""
        held = {}
        for layer in self.engine.layers:
            if layer.store is not None:
                table = layer.store.table_host
                unique = len(np.unique(table[table >= 0]))
                held[layer.index] = (unique, unique * layer.store.storage.page_bytes)
        return held

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' dense cache would hold after the same tokens, in the model's dtype."""
        return sum(self._full_nbytes(layer) for layer in self.engine.layers)

    def _full_nbytes(self, layer: Layer) -> int:
        if not layer.paged:
            return 0
        # A layer that never ran (SkipDecode) would have been filled by a dense cache: it is like its neighbours.
        store = layer.store or next((x.store for x in self.engine.layers if x.store is not None), None)
        if store is None:
            return 0
        columns = self.seen_tokens if layer.window is None else min(self.seen_tokens, layer.window - 1)
        width = store.storage.k_pages.shape[2] + store.storage.v_pages.shape[2]
        return store.rows * store.heads * columns * width * self._model_dtype_size

    def report(self) -> Report:
        """What every layer has seen, keeps and did; ``print()`` it, or read its ``rows``."""
        held = self._pages_held()
        rows = []
        for layer in self.engine.layers:
            kept = self.kept(layer.index)
            pages, nbytes = held.get(layer.index, (0, 0))
            rows.append(
                {
                    "layer": layer.index,
                    "seen": self.seen_tokens,
                    "kept_min": int(kept.min()) if kept.numel() else 0,
                    "kept_max": int(kept.max()) if kept.numel() else 0,
                    "pages": pages,
                    "nbytes": nbytes,
                    "full_nbytes": self._full_nbytes(layer),
                    "evictions": layer.counters["evictions"],
                    "selections": layer.counters["selections"],
                    "reuses": layer.counters["reuses"],
                }
            )
        reserved = sum(s.reserved_bytes for s in self.engine.storages.values())
        stores = [x.store for x in self.engine.layers if x.store is not None]
        side = sum(t.nbytes for s in stores for t in (s.table, s.counts, s.positions, s.columns))
        side += sum(t.nbytes for x in self.engine.layers for t in x.saved.values())
        decode = "eager" if self.graphs is None else str(self.graphs)
        return Report(str(self.policy), rows, reserved_nbytes=reserved, side_nbytes=side, decode=decode)

    def __repr__(self) -> str:
        return f"KVCache(policy={self.policy}, seen_tokens={self.seen_tokens}, nbytes={self.nbytes})"

    # -- the transformers contract ----------------------------------------------------------------------------------

    @uncompiled  # as attention.paged_attention
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer.

        In a forward of a wrapped model: returns the new keys and values with a handle for the attention function, or
        for materialised layers all entries densely. Outside of one: every entry is kept and returned densely, which
        only policies that keep everything allow (RuntimeError otherwise).
        """
        layer = self._layer(layer_idx)
        self._model_dtype_size = key_states.element_size()
        frame, step = current_frame(), self.engine.step
        with no_grad():
            # Some models hand over transposed views; the kernels read along the head.
            if key_states.stride(-1) != 1:
                key_states = key_states.contiguous()
            if value_states.stride(-1) != 1:
                value_states = value_states.contiguous()
            if frame is None or frame.cache is not self or step is None:
                return self._update_alone(layer, key_states, value_states)
            part = step.part  # the layer runs on these rows alone: the others store nothing
            if part is None:
                self.engine.append(layer, key_states, value_states, step)
            else:
                self.engine.append(layer, part.spread(key_states), part.spread(value_states), step)
            if layer.expands is not None:
                layer.new = None
                pre_hook = layer.expands == "pre-hook"
                k, v = dense_columns(layer, step) if pre_hook else self.engine.dense_slots(layer)
                return k.to(key_states.dtype), v.to(value_states.dtype)
        absorbed = layer_idx in self._plan.absorbed  # its entries may not have to be expanded
        layer.new = None if step.ready or absorbed or part is not None else (key_states, value_states)
        setattr(key_states, HANDLE, layer)
        setattr(value_states, HANDLE, layer)
        return key_states, value_states

    def _update_alone(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.policy
        if policy.retains or policy.selects or policy.schedules or policy.routes:
            raise RuntimeError(
                f"a cache with policy {policy} works only inside a forward of the wrapped model it was made for"
            )
        rows, _, tokens, _ = k.shape
        start = 0 if layer.store is None else layer.store.max_count
        positions = torch.arange(start, start + tokens, dtype=torch.int32).expand(rows, -1).contiguous()
        before = torch.full((rows,), start, dtype=torch.int32)
        step = Step(start, tokens, rows, positions, positions, before, before + tokens, tokens, None, False)
        if layer.store is not None:
            layer.store.storage.reserve(layer.store.pages_needed(tokens))
        self.engine.append(layer, k, v, step)
        if start + tokens > self.engine.seen:
            self.engine.seen, self.engine.tokens = start + tokens, before + tokens
        assert layer.store is not None
        return layer.store.gather("keys").to(k.dtype), layer.store.gather("values").to(v.dtype)

    def materialised_layer(self, index: int | None, key: Tensor, value: Tensor, module: str) -> Layer:
        """The layer whose dense entries the model transformed into ``key``, ``value``; RuntimeError if none fits."""
        if index is not None and self._plan.tiers.get(index) == "materialised":
            layer = self.engine.layers[index]
            if layer.store is not None and key.shape[2] == layer.store.max_count == value.shape[2]:
                return layer
        raise RuntimeError(
            f"{module} (layer_idx={index}) changed keys or values between the cache and the attention function "
            "in a way that kvcache did not foresee; please report the model"
        )

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen (padding included), the same for every layer also where a schedule skips some."""
        return self.seen_tokens

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns seen after ``query_length`` more, 0): masks speak of what was seen, not of what is kept."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Defer eviction and the scores of new queries until ``crop`` says which tokens were accepted."""
        self.engine.recording = True
        for layer in self._stateful_layers():
            if hasattr(layer, "activate_past_recording"):  # an indexer's keys are cropped by columns without it
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; 0 accepts all. Then evict what was deferred.

        Raises ValueError for a positive number (transformers 5.23 has no absolute form) or more than was seen.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # transformers 5.17 passes a tensor
        except TypeError:
            raise TypeError(f"tokens_to_remove must be an int, got {tokens_to_remove!r}") from None
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen_tokens:
            raise ValueError(
                f"tokens_to_remove must be in [-{self.seen_tokens}, 0], minus the number to forget, "
                f"got {tokens_to_remove}"
            )
        for layer in self._stateful_layers():
            if tokens_to_remove and not layer.is_croppable:
                raise ValueError(f"a {type(layer).__name__} keeps a recurrent state that cannot be taken back")
        for layer in self._stateful_layers():
            if tokens_to_remove or getattr(layer, "record_past", False):
                layer.crop(tokens_to_remove)
        self.engine.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes row ``beam_idx[r]``; pages are shared, not copied."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; pages are shared, not copied."""
        self._select_rows(torch.arange(len(self.engine.tokens)).repeat_interleave(repeats))

    def _select_rows(self, rows: Tensor) -> None:
        for layer in self._stateful_layers():
            layer.reorder_cache(rows)
        self.engine.select_rows(rows)

    def _stateful_layers(self) -> list[Any]:
        return [x for x in self.layers if is_stateful(x)]

    def begin(self, rows: int, tokens: int, mask: Tensor | None, alike: Tensor | None = None) -> None:
        """Open a forward: see :meth:`kvcache.engine.Engine.begin`."""
        if self._broken:
            raise RuntimeError(
                "a forward with this cache failed halfway, and the recurrent states of its layers cannot be taken "
                "back: start with a new cache"
            )
        self.engine.begin(rows, tokens, mask, alike)

    def abort(self) -> None:
        """Undo a forward that failed. Recurrent states cannot be undone: a cache that has some is of no more use."""
        first = self.seen_tokens == 0
        self.engine.abort()
        if not self._stateful_layers():
            return
        if first:
            self._renew_layers()
        else:
            self._broken = True

    def _renew_layers(self) -> None:
        self.layers = [make_layer(self, self._plan, x.index, x.window) for x in self.engine.layers]

    def reset(self) -> None:
        """Forget everything and free all pages."""
        self.engine.reset()
        if self.graphs is not None:
            self.graphs = DecodeGraphs()
        self._renew_layers()
        self._broken = False

    # -- copies -----------------------------------------------------------------------------------------------------

    def fork(self) -> KVCache:
        """An independent cache with the same content; pages are shared until one side writes to them."""
        twin = KVCache.__new__(KVCache)
        twin._adopt(self.engine.fork(), self._plan, self.graphs is not None)
        twin._model_dtype_size, twin._broken = self._model_dtype_size, self._broken
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            theirs.__dict__.update(copy.deepcopy(_own_state(mine)))
        return twin

    def scout(self) -> KVCache:
        """A fork for the forward that finds out which tokens of a prompt the policy reads: see ``Policy.scout``."""
        twin, scout = self.fork(), self.policy.scout
        assert scout is not None
        twin.engine.policy, twin.engine.scouting = scout, True
        twin.engine.max_tokens, twin.engine.prompt_columns = None, self.engine.prompt_columns
        return twin

    def __deepcopy__(self, memo: dict) -> KVCache:
        return self.fork()

    def export_state(self) -> dict[str, Any]:
        """Everything needed to continue elsewhere, as a dict of plain values and tensors (``torch.save`` takes it).

        Holds the kept entries, not the dense cache: the policy, tokens seen, positions, scores and the policy's state.
        """
        states = [copy.deepcopy(_own_state(x)) for x in self.layers]
        own = {"policy": str(self.policy), "dtype_size": self._model_dtype_size, "layer_states": states}
        return {**own, **self.engine.export_state()}

    @classmethod
    def import_state(cls, model: PreTrainedModel, state: dict[str, Any], **options: Any) -> KVCache:
        """A cache for the wrapped ``model`` with the content of :meth:`export_state`."""
        cache = cls(model, policy=state["policy"], **options)
        if len(state["layers"]) != len(cache.layers):
            raise ValueError(f"state has {len(state['layers'])} layers, but {type(model).__name__} {len(cache.layers)}")
        cache._model_dtype_size = state["dtype_size"]
        cache.engine.import_state(state, model.device)
        for layer, own in zip(cache.layers, state["layer_states"], strict=True):
            layer.__dict__.update(copy.deepcopy(own))
        return cache


def _own_state(layer: Any) -> dict[str, Any]:
    """What a layer object keeps besides pages; empty for one that keeps nothing else."""
    return {k: v for k, v in vars(layer).items() if k != "_cache"} if is_stateful(layer) else {}
