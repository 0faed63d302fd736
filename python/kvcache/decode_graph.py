"""``decode="auto"`` on a GPU: the one-token forward as one CUDA graph, captured once per shape and replayed.

A forward of one token per row does on the host, before the model runs, everything that the host has to do
(``Engine._prepare``), and afterwards only accounts for it (``Engine.finish``). What lies between, the model and the
eviction, launches kernels that read lengths, pages, selections and budgets from memory on the device: it can be
captured, and the graph stays right while those change. A new one is needed when memory moves (the pages, a table or a
column grows, which doubles it), for another number of rows, and for another set of layers that a schedule skips.

The first forward of a kind runs as it is, which also warms up the libraries; the second is captured; later ones are
replayed. Whatever cannot be captured runs as it is, for a reason that ``cache.report()`` shows and that is logged.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .attention import CACHE_ARGUMENTS, current_frame, parameters_of
from .policies.budget import FAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache import KVCache
    from .engine import Engine
    from .layer_state import Layer
    from .step import Step

__all__ = ["DecodeGraphs", "GraphedForward"]

logger = logging.getLogger("kvcache")
#: Kinds of forwards of one cache that may have a graph at once; the one unused for longest goes.
MOST_GRAPHS = 32


class NotCapturable(Exception):
    """Why a forward runs without a graph."""


@dataclass
class Captured:
    """One graph: where it reads its inputs, where it leaves its output, and what its forward changed."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: Any
    wrote: list[Layer]
    evicted: list[Layer]
    kept: tuple[Tensor, ...]  # everything that the graph reads and writes, so that no address is used anew


class DecodeGraphs:
    """The graphs of one cache."""

    def __init__(self) -> None:
        self.captured: OrderedDict[tuple, Captured] = OrderedDict()
        self.met: OrderedDict[tuple, None] = OrderedDict()  # run once, without a graph
        self.captures = self.replays = 0
        self.refused: str | None = None
        self._memory: tuple[int, ...] = ()
        self._pool: Any = None

    def __str__(self) -> str:
        if self.refused is not None and not self.captures:
            return f"eager: {self.refused}"
        return f"graph: {self.captures} captures, {self.replays} replays"

    def run(self, cache: KVCache, model: PreTrainedModel, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """``forward(**kwargs)``, a forward of one token per row that ``cache`` has been prepared for."""
        if self.refused is not None:
            return forward(**kwargs)
        step = cache.engine.step
        assert step is not None
        try:
            inputs, constants = split_inputs(kwargs)
            phases = phases_of(cache)
            if not places_given(model, kwargs) or None in phases or not cache.engine.evictable_in_advance(step):
                return forward(**kwargs)  # this time: the end of a prompt, shared pages, a first selection
            memory = memory_of(cache)
            addresses = tuple(map(id, memory))
            if addresses != self._memory:  # something grew: the graphs of before would only hold on to its old memory
                self.captured.clear()
                self._memory = addresses
            key = (
                tuple((n, t.shape, t.dtype, t.device) for n, t in inputs.items()),
                constants,
                frozenset(step.skipped),
                addresses,
                phases,
                weights_of(model),
            )
            found = self.captured.get(key)
            if found is None and key not in self.met:
                self._remember(self.met, key, None)
                return forward(**kwargs)
            if found is None:
                check_model(model)
                found = self._capture(cache.engine, step, forward, kwargs, inputs, memory)
                self._remember(self.captured, key, found)
            elif has_hooks(model):
                raise NotCapturable("a hook was added to one of the model's modules")
            else:
                for name, tensor in found.inputs.items():
                    tensor.copy_(inputs[name])
                cache.engine.advance(found.wrote)
            self.captured.move_to_end(key)
            found.graph.replay()
            self.replays += 1
            step.evicted = found.evicted
            return tree_map_only(Tensor, torch.clone, found.output)
        except NotCapturable as reason:
            self.refused = str(reason)
            self.captured.clear()
            logger.info("%s decodes without a CUDA graph: %s", type(model).__name__, reason)
            return forward(**kwargs)

    @staticmethod
    def _remember(where: OrderedDict, key: tuple, value: Any) -> None:
        where[key] = value
        if len(where) > MOST_GRAPHS:
            where.popitem(last=False)

    def _capture(
        self,
        engine: Engine,
        step: Step,
        forward: Callable[..., Any],
        kwargs: dict[str, Any],
        inputs: dict[str, Tensor],
        memory: tuple[Tensor, ...],
    ) -> Captured:
        """Capture the forward and the eviction behind it: nothing has run then, but the host counts the forward."""
        still = {name: tensor.clone() for name, tensor in inputs.items()}
        masked = {"attention_mask": None} if "attention_mask" in kwargs else {}
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before = engine.account()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = forward(**{**kwargs, **still, **masked})
                wrote = list(step.wrote)
                engine.advance()
                # With slack, what evicts is bulk, and runs without a graph; so does what merges.
                some = [] if engine.policy.slack else [x for x in engine.holding() if x.smallest_budget < FAR]
                evicted = [x for x in some if not engine.merges_in(x)]
                engine.evict_one(evicted, step)
        except BaseException as error:
            engine.restore(step, before)
            if not isinstance(error, RuntimeError):
                raise
            text = str(error).strip().splitlines()
            raise NotCapturable(f"it cannot be captured ({text[0] if text else type(error).__name__})") from error
        self.captures += 1
        return Captured(graph, still, output, wrote, evicted, memory)


def split_inputs(kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], tuple]:
    """Arguments of a forward as tensors that are copied for each replay, and as constants. The mask is left out: which
    columns are real is known by the cache."""
    tensors, constants = {}, []
    for name, value in sorted(kwargs.items()):
        if name in CACHE_ARGUMENTS:
            continue
        if isinstance(value, Tensor):
            if name == "attention_mask" and value.ndim == 2:
                continue
            if name == "attention_mask":
                raise NotCapturable("it is given an attention_mask that is not [rows, columns]")
            if not value.is_cuda:
                raise NotCapturable(f"{name} is on {value.device}")
            tensors[name] = value
        elif value is None or isinstance(value, (bool, int, float, str)):
            constants.append((name, value))
        else:
            raise NotCapturable(f"it is given {name} as a {type(value).__name__}")
    return tensors, tuple(constants)


def places_given(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether the places of the tokens come as tensors: else the model counts what the cache has seen, on the host."""
    parameters = parameters_of(type(model).forward)
    return all(kwargs.get(name) is not None for name in ("position_ids", "cache_position") if name in parameters)


def phases_of(cache: KVCache) -> tuple:
    """What a selecting policy goes by on the host, in the layers that it selects from; None where it may change."""
    if cache.policy.observes_generated:  # what it remembers is new tensors after every step
        return (None,)
    if not cache.policy.selects:
        return ()
    layers = [x for x in cache.engine.layers if x.window is None and x.store is not None]
    return tuple(cache.policy.phase(x.view()) for x in layers)


def memory_of(cache: KVCache) -> tuple[Tensor, ...]:
    """Every tensor of the cache that a forward reads or writes in place."""
    found: list[Tensor] = []
    for storage in cache.engine.storages.values():
        found += (storage.k_pages, storage.v_pages)
        if storage.bounds is not None:
            found.append(storage.bounds)
    for layer in cache.engine.layers:
        if layer.store is not None:
            store = layer.store
            found += (store.table, store.counts, store.positions, store.columns)
            found += [x for x in (layer.budgets, layer.recent, layer.events) if x is not None]
            found += [x for x in layer.state.values() if isinstance(x, Tensor)]
    found += cache.engine.inputs()
    return tuple(found)


def weights_of(model: PreTrainedModel) -> tuple[int, ...]:
    """Addresses that tell whether the weights have moved."""
    return tuple(p.data_ptr() for p in model.parameters())


def has_hooks(model: PreTrainedModel) -> bool:
    """Whether a module inside the model has a hook, which a replay would not call. The model's own run around it."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not _is_entry(m, model))


def _is_entry(module: nn.Module, model: PreTrainedModel) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(getattr(h, "model", None) is model for h in hooks)


def check_model(model: PreTrainedModel) -> None:
    """NotCapturable for a model whose forward is more than kernels of one device."""
    from .layers import wrapped_state

    state = wrapped_state(model)
    assert state is not None
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise NotCapturable(f"its weights are on {len(devices)} devices")
    if state.parallel is not None:
        raise NotCapturable("it is tensor-parallel")
    for index, tier in state.plan.tiers.items():
        if tier != "handle" and index not in state.plan.absorbed:
            raise NotCapturable(f"layer {index} is {tier}: it works on tensors whose shape changes with every token")
    if has_hooks(model):
        raise NotCapturable("a module inside it has a hook, which a replay would not call")
    if "position_ids" not in parameters_of(type(model).forward):
        raise NotCapturable("it takes no position_ids: it counts columns by the attention_mask, which grows")


class GraphedForward:
    """Stands for ``forward`` of a wrapped model on a GPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.model).forward.__get__(self.model)
        frame = current_frame()
        if args or frame is None or frame.cache is None or frame.model is not self.model:
            return forward(*args, **kwargs)
        cache = frame.cache
        step = cache.engine.step
        if step is None or not step.ready or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return forward(**kwargs)
        return forward(**kwargs) if cache.graphs is None else cache.graphs.run(cache, self.model, forward, kwargs)
