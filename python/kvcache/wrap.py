"""wrap and unwrap: make a transformers model generate with a paged, policy-driven cache, and undo it."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from . import _C
from .attention import NAME, cache_argument
from .cache import KVCache, check_options, check_prefill, resolve_policy
from .decode_graph import GraphedForward
from .generate_batch import generate_batch
from .layers import STATE, WrappedState, hook_forward, wrapped_state
from .mla import NAME as EXPANSION
from .mla import absorb, with_absorbed
from .parallel import tensor_parallel
from .policies import Policy
from .self_attending import watch_modules
from .store import STORAGE_DTYPES
from .tiers import plan_layers

if TYPE_CHECKING:
    from transformers import GenerationConfig

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
DECODE_MODES = ("auto", "eager")
#: Wrapped models: some share one configuration object, and with it the attention implementation.
_WRAPPED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


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
        decode: how single tokens run on a GPU. "auto": a forward of one token per row is captured once as a CUDA graph
            and replayed, where the model allows it (``cache.report()`` says); "eager": never. Without effect on a CPU.
        prefill: what ``generate(prefill_chunk_size=n)`` means. "whole": the policy decides when the prompt is complete,
            as without chunks. "chunked": it evicts after every chunk, with the budgets of the whole prompt, so that a
            head never holds more than its budget and n entries; what left early is not there for later chunks.

    Returns the model. Wrapping a wrapped model replaces policy and options. Raises TypeError or ValueError naming what
    is wrong, with the model untouched: an option, a policy or a model that is not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    resolved = resolve_policy(policy)
    check_options(page_size, kv_dtype, max_tokens, prefill)
    check_prefill(resolved, prefill)
    if decode not in DECODE_MODES:
        raise ValueError(f"decode must be one of {DECODE_MODES}, got {decode!r}")
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not a decoder-only model that generates: kvcache cannot wrap it")
    check_devices(model)
    if model.dtype not in STORAGE_DTYPES:
        raise ValueError(f"{name} computes in {model.dtype}, kvcache in one of {', '.join(map(str, STORAGE_DTYPES))}")
    previous = wrapped_state(model)
    parallel = tensor_parallel(model)
    plan = previous.plan if previous else plan_layers(model)
    if not previous and parallel is None:
        plan = with_absorbed(model, plan)
    resolved.check(len(plan.windows))
    state = WrappedState(
        resolved, page_size, kv_dtype, max_tokens, plan, parallel=parallel, prefill=prefill, decode=decode
    )
    state.check_policy(model, resolved)
    unwrap(model)
    if plan.self_attending:
        state.watched = watch_modules(model)
    else:
        state.original = switch_implementation(model, NAME)
        if state.original == NAME and (other := _sharer(model)) is not None:
            state.original = other.original
    state.absorbed = absorb(model, plan)
    state.handles = hook_forward(model)
    setattr(model, STATE, state)
    _WRAPPED.add(model)
    state.route(model, resolved)
    # No methods: those are pickled by the name of their function, which the model's class does not have.
    model._prepare_cache_for_generation = functools.partial(_prepare_cache, model)
    model.generate_batch = functools.partial(generate_batch, model)
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
    for module in (*state.routed, *state.watched):
        module.__dict__.pop("forward", None)
    for name in ("_prepare_cache_for_generation", "generate_batch"):
        model.__dict__.pop(name, None)
    if isinstance(model.__dict__.get("forward"), GraphedForward):
        del model.forward
    for module in state.absorbed:
        module.__dict__.pop(EXPANSION, None)
    delattr(model, STATE)
    _WRAPPED.discard(model)
    if _sharer(model) is not None:
        return model  # which still needs the implementation, and knows the one before
    if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        switch_implementation(model, state.original)
    return model


def _sharer(model: PreTrainedModel) -> WrappedState | None:
    """The state of another wrapped model that has the same configuration object and its attention implementation."""
    text = model.config.get_text_config(decoder=True)
    for other in _WRAPPED:
        state = None if other is model else wrapped_state(other)
        if state is None or state.plan.self_attending:
            continue
        if other.config.get_text_config(decoder=True) is text:
            return state
    return None


def switch_implementation(model: PreTrainedModel, name: str) -> str:
    """Switch the decoder's attention implementation; returns the one before. ValueError if the model ignores it."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    if text is model.config:
        model.set_attn_implementation(name)
    else:  # keep vision and audio towers on their own implementation
        key = next(k for k in model.config.sub_configs if getattr(model.config, k) is text)
        model.set_attn_implementation({key: name})
    if text._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} refuses to use another attention implementation")
    return before or "sdpa"


@contextmanager
def frozen_with(model: PreTrainedModel, name: str) -> Iterator[None]:
    """``model`` in eval mode, without gradients of its own and with the attention registered as ``name``, for a block;
    afterwards it is what it was. ValueError if the model ignores the attention."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training, before = model.training, switch_implementation(model, name)
    try:
        model.requires_grad_(False).eval()
        yield
    finally:
        switch_implementation(model, before)
        for p, requires in wanted.items():
            p.requires_grad_(requires)
        model.train(training)


def _prepare_cache(
    self: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Where ``generate`` makes its cache: make ours unless the user asked for another one or for none."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.any(1).all()):
        row = int((~mask.bool().any(1)).nonzero()[0])
        raise ValueError(f"row {row} of the prompt is empty: its attention_mask is 0 everywhere")
    name = cache_argument(inspect.signature(type(self).forward).parameters)
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
        cache.engine.prompt_columns = columns
        cache.engine.prompt_length = columns if generation_config.prefill_chunk_size is not None else None
    return None
