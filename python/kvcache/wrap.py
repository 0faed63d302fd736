"""wrap and unwrap: make a transformers model generate with a paged, policy-driven cache, and undo it."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from . import _C
from .attention import NAME, cache_argument
from .cache import KVCache, check_options, layer_windows, resolve_policy
from .engine import PREFILL_MODES
from .layers import STATE, WrappedState, hook_forward, wrapped_state
from .policies import Policy
from .store import STORAGE_DTYPES

if TYPE_CHECKING:
    from transformers import GenerationConfig

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
DECODE_MODES = ("auto", "eager")
MAX_HEAD_SIZE = 256


def wrap(
    model: ModelT,
    policy: Policy | str = "full",
    *,
    page_size: int = 16,
    kv_dtype: str | torch.dtype = "auto",
    max_tokens: int | None = None,
    decode: str = "auto",
    prefill: str = "whole",
) -> ModelT:
    """Let ``model`` generate with a paged cache that follows ``policy``; in place, ``generate()`` works unchanged.

    Arguments
        model: a transformers decoder-only causal language model.
        policy: a :class:`kvcache.Policy`, several joined by ``|``, or the text form, e.g. ``"h2o(heavy=0.1)"``.
        page_size: entries per page; a page belongs to one (row, layer, kv head).
        kv_dtype: dtype in which keys and values are stored: "auto" (the model's), "fp32", "bf16", "fp16" or the
            torch dtype. Arithmetic is float32 in any case.
        max_tokens: tokens, summed over the rows, that the pool may hold at once; None: as many as memory allows.
        decode: "auto" or "eager": how single tokens run; both are eager on a CPU.
        prefill: what ``generate(prefill_chunk_size=n)`` means. "whole": the policy decides when the prompt is complete,
            as without chunks. "chunked": it evicts after every chunk, with the budgets of the whole prompt, so that a
            head never holds more than its budget and n entries; what left early is not there for later chunks.

    Returns the model. Wrapping a wrapped model replaces policy and options. Raises TypeError or ValueError naming what
    is wrong, with the model untouched: an option, a policy or a model that is not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    resolved = resolve_policy(policy)
    check_options(page_size, kv_dtype, max_tokens)
    if decode not in DECODE_MODES:
        raise ValueError(f"decode must be one of {DECODE_MODES}, got {decode!r}")
    if prefill not in PREFILL_MODES:
        raise ValueError(f"prefill must be one of {PREFILL_MODES}, got {prefill!r}")
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not a decoder-only model that generates: kvcache cannot wrap it")
    check_devices(model)
    if model.dtype not in STORAGE_DTYPES:
        raise ValueError(f"{name} computes in {model.dtype}, kvcache in one of {', '.join(map(str, STORAGE_DTYPES))}")
    windows = layer_windows(model)
    resolved.check(len(windows))
    materialised = attention_tiers(model, len(windows))

    previous = wrapped_state(model)
    state = WrappedState(
        resolved, page_size, kv_dtype, max_tokens, windows, materialised, previous.original if previous else "", prefill
    )
    state.check_policy(model, resolved)
    unwrap(model)
    state.original = _set_implementation(model, NAME)
    state.handles = hook_forward(model)
    setattr(model, STATE, state)
    state.route(model, resolved)
    model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)
    return model


def check_devices(model: PreTrainedModel) -> None:
    """ValueError unless every parameter is where kvcache has kernels: on the CPU or on a CUDA device."""
    name = type(model).__name__
    for device in {p.device for p in model.parameters()}:
        if device.type == "cpu":
            continue
        if device.type != "cuda":
            raise ValueError(f"{name} has parameters on {device}: kvcache runs on the CPU and on CUDA devices")
        if not _C.cuda_info()["compiled"]:
            raise ValueError(f"{name} is on {device}, but this kvcache was built without nvcc: it has no CUDA kernels")


def unwrap(model: ModelT) -> ModelT:
    """Undo :func:`wrap`: the model is exactly as it was. A model that is not wrapped is left alone. Returns it."""
    state = wrapped_state(model)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    for layer in state.routed:
        layer.__dict__.pop("forward", None)
    model.__dict__.pop("_prepare_cache_for_generation", None)
    delattr(model, STATE)
    if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        _set_implementation(model, state.original)
    return model


def _set_implementation(model: PreTrainedModel, name: str) -> str:
    """Switch the decoder's attention implementation; returns the one before. ValueError if the model ignores it."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    if text is model.config:
        model.set_attn_implementation(name)
    else:  # keep vision and audio towers on their own implementation
        key = next(k for k in model.config.sub_configs if getattr(model.config, k) is text)
        model.set_attn_implementation({key: name})
    if text._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, which kvcache needs so far"
        )
    return before or "sdpa"


def _prepare_cache(
    self: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Where ``generate`` makes its cache: make ours unless the user asked for another one or for none."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.any(1).all()):
        row = int((~mask.bool().any(1)).nonzero()[0])
        raise ValueError(f"row {row} of the prompt is empty: its attention_mask is 0 everywhere")
    name = cache_argument(inspect.signature(type(self).prepare_inputs_for_generation).parameters)
    given = model_kwargs.get(name) is not None
    if not given and generation_config.use_cache is not False and generation_config.cache_implementation is None:
        model_kwargs[name] = KVCache(self)
        if generation_config.is_assistant:
            model_kwargs[name].activate_past_recording()
    else:
        type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get(name)
    if isinstance(cache, KVCache):
        if cache.engine.recording and not generation_config.is_assistant:
            # A kept cache may come from assisted decoding, which asks for recording anew: accept what it left.
            cache.crop(0)
            cache.engine.recording = False
        # In chunks nothing tells the last one; the policy must know when the whole prompt is there.
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        cache.engine.prompt_length = columns if generation_config.prefill_chunk_size is not None else None
    return None


# -- how a model's attention uses its cache -------------------------------------------------------------------------


def attention_tiers(model: PreTrainedModel, count: int) -> frozenset[int]:
    """Layers whose model code transforms keys or values between ``update()`` and the attention function (MLA).

    Those get their entries densely (materialised); all others only a handle. Read off the source of every attention
    module. ValueError names a layer without a module that kvcache understands.
    """
    found: dict[int, bool] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index >= count:
            continue
        transforms = _transforms_after_update(type(module))
        if transforms is None:
            continue
        size = getattr(module, "head_dim", 0)
        if isinstance(size, int) and size > MAX_HEAD_SIZE:
            raise ValueError(
                f"{type(module).__name__} of layer {index} has heads of size {size}; "
                f"kvcache reads up to {MAX_HEAD_SIZE}"
            )
        found[index] = found.get(index, False) or transforms
    missing = [i for i in range(count) if i not in found]
    if missing:
        kinds = sorted({type(m).__name__ for m in model.modules() if getattr(m, "layer_idx", None) in missing})
        raise ValueError(
            f"{type(model).__name__}: layer {missing[0]} has no attention module that calls update() of the cache "
            f"and transformers' attention interface (modules of that layer: {', '.join(kinds) or 'none found'}); "
            "kvcache does not support this model yet"
        )
    return frozenset(i for i, transforms in found.items() if transforms)


def _transforms_after_update(cls: type[nn.Module]) -> bool | None:
    """Whether ``cls.forward`` changes keys or values after caching them; None if it does no cached attention."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return None
    names: list[str] | None = None
    updated = called = 0
    passed: list[str | None] = []
    mask: str | None = None
    assigned: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            call = node.value
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "update":
                if len(targets) == 2:
                    names, updated = targets, node.lineno
                continue
            assigned += [(node.lineno, n) for n in targets]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
            by_name = {k.arg: k.value for k in node.keywords}
            arguments = [*node.args[2:4], *(by_name[k] for k in ("key", "value") if k in by_name)]
            passed, called = [a.id if isinstance(a, ast.Name) else None for a in arguments[:2]], node.lineno
            given = [*node.args[4:5], *(by_name[k] for k in ("attention_mask",) if k in by_name)]
            mask = next((a.id for a in given if isinstance(a, ast.Name)), None)
    if names is None or not called or mask != "attention_mask":  # Doge makes a mask of its own
        return None
    return passed != names or any(n in names and updated < line < called for line, n in assigned)
