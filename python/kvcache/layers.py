"""Hooks into the decoder: the forward that a cache serves, and the layers that a schedule skips."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import CACHE_ARGUMENTS, NAME, Frame, cache_argument, current_frame, parameters_of, set_frame
from .compiling import uncompiled
from .decode_graph import GraphedForward
from .parallel import TensorParallel
from .rotation import Rotation
from .step import Part, Step
from .tiers import LayerPlan

if TYPE_CHECKING:
    import torch.utils.hooks
    from transformers import PreTrainedModel

    from .policies import Policy

STATE = "_kvcache_state"


@dataclass
class WrappedState:
    """What ``wrap`` did to a model and what it was told; kept on the model as ``_kvcache_state``."""

    policy: Policy
    page_size: int
    kv_dtype: Any
    max_tokens: int | None
    plan: LayerPlan
    original: str = ""
    parallel: TensorParallel | None = None
    prefill: str = "whole"
    decode: str = "auto"
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    routed: list[nn.Module] = field(default_factory=list)
    watched: list[nn.Module] = field(default_factory=list)
    absorbed: list[nn.Module] = field(default_factory=list)
    _rotation: Rotation | ValueError | None = None

    windows = property(lambda self: self.plan.windows)
    materialised = property(lambda self: self.plan.materialised)
    tiers = property(lambda self: self.plan.tiers)

    def check_policy(self, model: PreTrainedModel, policy: Policy) -> None:
        """ValueError if ``policy`` cannot work on this model; nothing is changed."""
        name = type(model).__name__
        config = vars(model.config.get_text_config(decoder=True))
        heads = [v for k, v in config.items() if "key_value_heads" in k and type(v) is int]
        # More than one number, or keys that are cached in another form: layers say themselves what they hold.
        if len(heads) == 1 and set(self.tiers.values()) <= {"handle", "own"}:
            policy.check_heads(heads[0])
        moved = f"positions={policy.positions!r}" if policy.positions != "original" else None
        if moved and (self.materialised or any(w is not None for w in self.windows)):
            raise ValueError(
                f"{policy}: {moved} needs full attention with keys as cached, "
                f"but {name} has sliding windows or transforms its keys after the cache"
            )
        if policy.relocates and self.plan.self_attending:
            raise ValueError(f"{policy}: {moved} needs the queries, but {name} computes attention itself")
        if policy.selects and self.materialised:
            raise ValueError(
                f"{policy}: selection needs the keys as cached, but {name} transforms them after the cache (MLA)"
            )
        if policy.selects and self.plan.self_attending:
            raise ValueError(
                f"{policy}: selection needs the queries, but {name} computes attention itself and shows them to nobody"
            )
        if policy.schedules and (stuck := self.plan.unskippable) is not None:
            raise ValueError(
                f"{policy}: no layer of {name} can be skipped: layer {stuck} keeps a recurrent state or an indexer's "
                "keys, or reads another layer's entries"
            )
        if policy.observes and (self.materialised or self.plan.self_attending):
            why = "makes keys of what is cached (MLA)" if self.materialised else "computes attention itself"
            raise ValueError(f"{policy} needs queries that are made for the cached keys, but {name} {why}")
        if policy.merges and self.materialised:
            raise ValueError(f"{policy}: merging needs the keys and values as cached, but {name} makes them anew (MLA)")
        merges = f"{policy}: merging keys" if policy.merges_keys else None
        turns = moved or merges or (str(policy) if policy.observes else None)
        if turns is not None and isinstance(found := self._find_rotation(model), ValueError):
            raise ValueError(f"{turns} {found}")
        if policy.schedules and not self.routed:
            decoder_layers(model, len(self.windows))

    def rotation(self, model: PreTrainedModel) -> Rotation | None:
        """The model's rotation, if it has one that is understood."""
        found = self._find_rotation(model)
        return None if isinstance(found, ValueError) else found

    def _find_rotation(self, model: PreTrainedModel) -> Rotation | ValueError:
        """The rotation or why there is none; looked for once per wrap, not once per cache."""
        if self._rotation is None:
            try:
                self._rotation = Rotation(model)
            except ValueError as error:
                self._rotation = error
        return self._rotation

    def route(self, model: PreTrainedModel, policy: Policy) -> None:
        """Make the decoder layers follow a schedule once a policy has one."""
        if policy.schedules and not self.routed:
            self.routed = route_layers(model, len(self.windows))

    def captures(self, model: PreTrainedModel) -> bool:
        """Whether single tokens run by captured graphs where they can: on a GPU, unless told otherwise.

        Asked with every cache, as a model may move after ``wrap``.
        """
        if self.decode == "eager" or model.device.type != "cuda" or self.plan.self_attending:
            return False
        if "forward" not in model.__dict__:
            model.forward = GraphedForward(model)  # on the instance: the class stays as it is
        return isinstance(model.forward, GraphedForward)


def wrapped_state(model: nn.Module) -> WrappedState | None:
    return model.__dict__.get(STATE)


# -- the forward ----------------------------------------------------------------------------------------------------


class OpenForward:
    """Pre-hook of the model: finds or makes the cache of this forward and opens a step on it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        from .cache import KVCache

        frame = current_frame()
        if frame is not None and frame.model is self.model:
            return None  # an outer module of the same model opened it
        state = wrapped_state(self.model)
        assert state is not None
        names = parameters_of(type(module).forward)
        kwargs = {**dict(zip(names, args)), **kwargs}
        implementation = self.model.config.get_text_config(decoder=True)._attn_implementation
        name = cache_argument(names)
        if name not in kwargs and (given := kwargs.keys() & CACHE_ARGUMENTS):
            kwargs[name] = kwargs.pop(given.pop())  # the argument's name in another version of transformers
        cache = kwargs.get(name)
        if cache is None and self._wants_cache(kwargs):
            cache = kwargs[name] = KVCache(self.model)
        if not isinstance(cache, KVCache):
            set_frame(Frame(None, state.original, self.model, module, frame))
            return (), kwargs
        if implementation != NAME and not state.plan.self_attending:
            raise RuntimeError(
                f"the attention implementation of the wrapped {type(self.model).__name__} was changed to "
                f"{implementation!r}; call kvcache.unwrap(model) to stop using kvcache"
            )
        if len(cache.layers) != len(state.windows):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, but {type(self.model).__name__} {len(state.windows)}"
            )
        if kwargs.get("output_attentions") or self.model.config.output_attentions:
            raise ValueError("output_attentions=True is not possible: paged attention never holds the probabilities")
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if not isinstance(inputs, Tensor):
            raise ValueError("a wrapped model needs input_ids or inputs_embeds")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask = mask.to(device="cpu", dtype=torch.bool)
        else:
            mask = None
        # A model that computes attention itself needs the entries of every row.
        shared = not cache.engine.seen and not state.plan.self_attending
        cache.begin(inputs.shape[0], inputs.shape[1], mask, first_alike(kwargs, inputs.shape[0]) if shared else None)
        set_frame(Frame(cache, state.original, self.model, module, frame))
        return (), kwargs

    def _wants_cache(self, kwargs: dict[str, Any]) -> bool:
        if self.model.training:
            return False
        use_cache = kwargs.get("use_cache")
        return bool(self.model.config.get_text_config(decoder=True).use_cache if use_cache is None else use_cache)


class CloseForward:
    """Post-hook, called always: closes the step, or undoes it when the forward failed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        frame = current_frame()
        if frame is None or frame.opener is not module:
            return
        set_frame(frame.previous)
        if frame.cache is None:
            return
        with torch.no_grad():
            if output is None:  # torch passes None when the forward raised
                frame.cache.abort()
            else:
                frame.cache.engine.finish()


def first_alike(inputs: dict[str, Any], rows: int) -> Tensor | None:
    """For each row the first one with the same inputs, [rows] int64; None if that cannot be told, or for one row.

    ``generate`` repeats a prompt for every beam and sample before the model sees it.
    """
    if rows == 1:
        return None
    first = torch.ones(rows, rows, dtype=torch.bool)
    for value in inputs.values():
        if isinstance(value, (dict, list, tuple)) and len(value):
            return None  # whatever is in there
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] == 1:
            continue
        if value.shape[0] != rows:
            if value.ndim == 1:  # of columns, not of rows
                continue
            return None
        _, kind = value.detach().cpu().reshape(rows, -1).unique(dim=0, return_inverse=True)
        first &= kind[:, None] == kind
    return first.int().argmax(1)


def hook_forward(model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks on the model and on the decoder inside it, so that either can be called; the outermost one acts."""
    entries: list[nn.Module] = [model, model.base_model]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module):
        entries.append(decoder)
    handles = []
    for module in dict.fromkeys(entries):
        handles.append(module.register_forward_pre_hook(OpenForward(model), with_kwargs=True))
        handles.append(module.register_forward_hook(CloseForward(model), with_kwargs=True, always_call=True))
    return handles


# -- layer schedule -------------------------------------------------------------------------------------------------


class RoutedForward:
    """Stands for ``forward`` of one decoder layer: tokens that skip the layer keep their hidden state.

    Rows that all of their tokens skip are left out: the layer runs on the others alone.
    """

    def __init__(self, layer: nn.Module, index: int, form: dict[str, Any]) -> None:
        self.layer, self.index, self.form = layer, index, form
        functools.update_wrapper(self, type(layer).forward)

    @torch.compiler.disable(recursive=False)  # the layer inside is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        step = None if frame is None or frame.cache is None else frame.cache.engine.step
        if step is not None and self.index in step.skipped:
            return self._as_output(args[0] if args else kwargs["hidden_states"])
        active = None if step is None else step.runs(self.index)
        if active is None or step is None or frame is None:
            return self._run(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        part = _rows_that_run(frame, step, self.index, active, (args, kwargs))
        if part is None:
            out = self._run(args, kwargs)
            new = out[0] if isinstance(out, tuple) else out
            new = torch.where(active[:, :, None].to(new.device), new, hidden)
            return (new, *out[1:]) if isinstance(out, tuple) else new
        args, kwargs = _pieces(step, part, (args, kwargs), hidden)
        step.part = part
        try:
            out = self._run(args, kwargs)
        finally:
            step.part = None
        new, *others = out if isinstance(out, tuple) else (out,)
        if active.shape[1] > 1:
            runs = part.take(active.to(new.device))[:, :, None]
            new = torch.where(runs, new, part.take(hidden))
        new = part.put(hidden, new)
        return (new, *others) if isinstance(out, tuple) else new

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = type(self.layer).forward(self.layer, *args, **kwargs)
        self.form["tuple"] = len(out) if isinstance(out, tuple) else 0
        return out

    def _as_output(self, hidden: Tensor) -> Any:
        """``hidden`` in the form that layers of this model return; they share ``form``, and one has always run."""
        size = self.form.get("tuple", 0)
        return (hidden, *[None] * (size - 1)) if size else hidden


def _rows_that_run(frame: Frame, step: Step, index: int, active: Tensor, inputs: tuple) -> Part | None:
    """The rows with a token that runs layer ``index``; None: run all, as no row can be left out."""
    total = active.shape[0]
    if total == 1 or step.repeats is not None or frame.cache is None or frame.cache.tier(index) != "handle":
        return None
    hidden = inputs[0][0] if inputs[0] else inputs[1]["hidden_states"]
    key = (active.numpy().tobytes(), hidden.device)
    if key not in step.parts:
        rows = active.any(1).nonzero().squeeze(-1)
        given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        plain = len(rows) < total and all(_is_batch(x, total, active.shape[1]) is not None for x in given)
        step.parts[key] = Part(rows.to(hidden.device), total) if plain else None
    return step.parts[key]


def _is_batch(x: Tensor, total: int, tokens: int) -> bool | None:
    """Whether a layer's input has the batch of ``total`` rows as its first dimension; None: that cannot be told."""
    if x.ndim < 4 and total not in x.shape[:-1] and (x.ndim != 1 or len(x) != total):
        return False  # the same for all rows
    if x.ndim in (2, 3) and x.shape[0] == total and x.shape[1] == tokens != total:
        return True
    return None  # a mask, positions of several kinds, ...


def _pieces(step: Step, part: Part, inputs: Any, hidden: Tensor) -> Any:
    """The ``inputs`` of a layer for the rows of ``part``; what other layers get as well is cut once."""

    def piece(x: Tensor) -> Tensor:
        if not _is_batch(x, part.total, step.tokens):
            return x
        if x is hidden:
            return part.take(x)
        key = (id(x), id(part))
        if key not in step.pieces:
            step.pieces[key] = (x, part.take(x))  # with x itself, so that its id stays its own
        return step.pieces[key][1]

    return tree_map_only(Tensor, piece, inputs)


def decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The ``count`` decoder layers of a model; ValueError if they are not found."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList)
        and len(m) == count
        and all(isinstance(x, GradientCheckpointingLayer) for x in m)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__}: found {len(lists)} lists of {count} decoder layers instead of one, "
            "so no layer can be skipped"
        )
    return list(lists[0])


def route_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """Make the decoder layers follow the schedule of the cache in use, until ``unwrap``."""
    layers = decoder_layers(model, count)
    form: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        layer.forward = RoutedForward(layer, i, form)  # on the instance: the class stays as it is
    return layers
