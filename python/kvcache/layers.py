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
from .projection import OutputProjections
from .reading import Scouted
from .rotation import Rotation
from .step import Narrow, Part, Step
from .tiers import LayerPlan, interface_modules

if TYPE_CHECKING:
    import torch.utils.hooks
    from transformers import PreTrainedModel

    from .cache import KVCache
    from .engine import Engine
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
    shows_hidden: bool = False
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
        if (policy.schedules or policy.routes) and (stuck := self.plan.unskippable) is not None:
            raise ValueError(
                f"{policy}: no layer of {name} can be skipped: layer {stuck} keeps a recurrent state or an indexer's "
                "keys, or reads another layer's entries"
            )
        if policy.needs_hidden:
            size = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
            layers = sorted(hidden_modules(model, self.plan, str(policy)))
            policy.check_hidden(layers, size if type(size) is int else None)
        if (policy.observes or policy.routes) and (self.materialised or self.plan.self_attending):
            why = "makes keys of what is cached (MLA)" if self.materialised else "computes attention itself"
            raise ValueError(f"{policy} needs queries that are made for the cached keys, but {name} {why}")
        if policy.merges and self.materialised:
            raise ValueError(f"{policy}: merging needs the keys and values as cached, but {name} makes them anew (MLA)")
        merges = f"{policy}: merging keys" if policy.merges_keys else None
        turns = moved or merges or (str(policy) if policy.needs_rotation else None)
        if turns is not None and isinstance(found := self._find_rotation(model), ValueError):
            raise ValueError(f"{turns} {found}")
        self.projections(model, policy)
        if (policy.schedules or policy.routes) and not self.routed:
            decoder_layers(model, len(self.windows))

    def projections(self, model: PreTrainedModel, policy: Policy) -> OutputProjections | None:
        """The model's output projections, if ``policy`` needs them; ValueError if they are not known."""
        if not policy.needs_output_projection:
            return None
        try:
            return OutputProjections(model, self.plan, 1 if self.parallel is None else self.parallel.size)
        except ValueError as error:
            raise ValueError(f"{policy} {error}") from None

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
        """Make the decoder layers follow a schedule or a routing, and attention modules show their input, once a
        policy asks for it."""
        if (policy.schedules or policy.routes) and not self.routed:
            self.routed = route_layers(model, len(self.windows))
        if policy.needs_hidden and not self.shows_hidden:
            self.shows_hidden = True
            for index, module in hidden_modules(model, self.plan, str(policy)).items():
                self.handles.append(module.register_forward_pre_hook(ShowHidden(model, index), with_kwargs=True))

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
        if cache.policy.scout is not None:
            mask = self._filtered(module, cache, kwargs, inputs, mask)
        # A model that computes attention itself needs the entries of every row.
        shared = not cache.engine.seen and not state.plan.self_attending
        cache.begin(inputs.shape[0], inputs.shape[1], mask, first_alike(kwargs, inputs.shape[0]) if shared else None)
        set_frame(Frame(cache, state.original, self.model, module, frame))
        return (), kwargs

    def _filtered(
        self, module: nn.Module, cache: KVCache, kwargs: dict[str, Any], inputs: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The mask of a forward, bool [rows, seen + T], without the tokens of a prompt that the policy leaves out.

        Mask and positions in ``kwargs`` follow it. Raises ValueError for such as cannot.
        """
        engine, (rows, tokens) = cache.engine, inputs.shape[:2]
        engine.check_whole(tokens)
        names = parameters_of(type(module).forward)
        for name in ("attention_mask", "position_ids"):
            if isinstance(given := kwargs.get(name), Tensor) and given.ndim != 2:
                raise ValueError(f"{cache.policy} needs {name} of two dimensions, got {tuple(given.shape)}")
        if mask is None:
            mask = torch.ones(rows, engine.seen + tokens, dtype=torch.bool)
        if engine.real is not None and mask.shape == (len(engine.real), engine.seen + tokens):
            mask = torch.cat([engine.real, mask[:, engine.seen :]], 1)

        def tell(mask: Tensor) -> None:
            kwargs["attention_mask"] = mask.to(inputs.device, torch.long)
            if "position_ids" in names:
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:].to(inputs.device)

        tell(mask)
        if tokens > 1 and engine.begins_prompt(tokens):
            try:
                module(**{**kwargs, cache_argument(names): cache.scout()})
            except Scouted as found:
                mask = torch.cat([mask[:, :-tokens], found.runs], 1)
            tell(mask)
        return mask

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


# -- hidden states --------------------------------------------------------------------------------------------------


class ShowHidden:
    """Pre-hook of an attention module: notes what enters it, for policies that go by hidden states."""

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        self.model, self.index = model, index  # ``model`` tells that the hook is ours: captured graphs hold its work

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = current_frame()
        if frame is None or frame.cache is None or not frame.cache.policy.needs_hidden:
            return
        engine = frame.cache.engine
        hidden = args[0] if args else kwargs["hidden_states"]
        part = None if engine.step is None else engine.step.part
        engine.layers[self.index].hidden = hidden if part is None else part.spread(hidden)


def hidden_modules(model: PreTrainedModel, plan: LayerPlan, who: str) -> dict[int, nn.Module]:
    """Layer -> the attention module whose input is its hidden states, for the layers that cache keys and values.

    ValueError, in the name of ``who``, for the layer whose module is not known to have such an input.
    """
    needs = f"{who} needs the hidden states that enter attention"
    for index, tier in plan.tiers.items():
        if tier not in ("handle", "own"):
            why = "makes keys of what is cached (MLA)" if tier == "materialised" else "computes attention itself"
            raise ValueError(f"{needs}, but layer {index} of {type(model).__name__} {why}")
    found = dict(interface_modules(model, [i for i, tier in plan.tiers.items() if tier == "handle"]))
    for index, module in found.items():
        if parameters_of(type(module).forward)[:1] != ["hidden_states"]:
            module_name = type(module).__name__
            raise ValueError(f"{needs}, but {module_name} of layer {index} does not take them as its first argument")
    return found


# -- layer schedule -------------------------------------------------------------------------------------------------


class RoutedForward:
    """Stands for ``forward`` of one decoder layer: tokens that skip the layer keep their hidden state.

    Rows that all of their tokens skip (a schedule) and columns that are dropped from a prompt (token routing) are left
    out: the layer runs on the others alone.
    """

    def __init__(self, layer: nn.Module, index: int, form: dict[str, Any]) -> None:
        self.layer, self.index, self.form = layer, index, form
        functools.update_wrapper(self, type(layer).forward)

    @torch.compiler.disable(recursive=False)  # the layer inside is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        step = None if frame is None or frame.cache is None else frame.cache.engine.step
        if step is not None and frame is not None and frame.cache is not None and step.narrow is not None:
            return self._narrowed(frame.cache.engine, step, step.narrow, args, kwargs)
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

    def _narrowed(self, engine: Engine, step: Step, narrow: Narrow, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer on the tokens of ``step`` that still run: by itself, as it may drop some in its turn."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if narrow.step is None:
            narrow.settle(step, all(_token_dim(x, *hidden.shape[:2]) is not None for x in tree_leaves((args, kwargs))))
        args, kwargs = _cut(narrow, (args, kwargs), hidden)
        engine.step = narrow.step
        try:
            out = self(*args, **kwargs)
        finally:
            engine.step = step
        if isinstance(out, tuple):
            return (narrow.put(hidden, out[0]), *out[1:])
        return narrow.put(hidden, out)

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


def _token_dim(x: Any, rows: int, tokens: int) -> int | None:
    """Which dimension of a layer's input ``x`` are the tokens, 0: none; None: that cannot be told."""
    if not isinstance(x, Tensor) or tokens not in x.shape:
        return 0
    if x.ndim < 2 or x.shape[0] not in (1, rows):
        return None
    if x.ndim == 4:  # masks [rows, heads, tokens, columns]; anything else must leave no choice
        return 2 if x.shape[2] == tokens != x.shape[1] else None
    return 1 if x.ndim <= 3 and x.shape[1] == tokens else None


def _cut(narrow: Narrow, inputs: Any, hidden: Tensor) -> Any:
    """The ``inputs`` of a layer for the columns that run; what other layers get as well is cut once."""

    def piece(x: Tensor) -> Tensor:
        dim = _token_dim(x, *hidden.shape[:2])
        if not dim:
            return x
        if x is hidden:
            return narrow.take(x)
        if id(x) not in narrow.pieces:
            narrow.pieces[id(x)] = (x, narrow.take(x, dim))  # with x itself, so that its id stays its own
        return narrow.pieces[id(x)][1]

    return inputs if narrow.columns is None else tree_map_only(Tensor, piece, inputs)


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
