"""The attention and mask functions registered with transformers under the name ``kvcache``.

``update()`` of a cache layer returns the new tokens' keys and values with a handle to the layer on both; the attention
function finds its layer through it. While no kvcache forward is under way (``use_cache=False``, training, a cache of
another kind) both functions are what the model used before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compiling import uncompiled
from .layer_state import HANDLE, Layer
from .mla import absorption_of
from .step import Attention

if TYPE_CHECKING:
    from .cache import KVCache

if not Version("5.17") <= Version(transformers.__version__) < Version("6.dev0"):
    raise ImportError(f"kvcache works with transformers 5.17 to 5.x, found {transformers.__version__}")

NAME = "kvcache"  # plain on purpose: "flash" or "paged|" in a name changes transformers' behaviour
#: The name of a model's argument and output that holds its cache: since transformers 5.24, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(parameters: Iterable[str]) -> str:
    """Which of :data:`CACHE_ARGUMENTS` a function with these parameters has."""
    new, old = CACHE_ARGUMENTS
    return new if new in parameters else old


@functools.cache
def parameters_of(forward: Callable) -> list[str]:
    """Names of the parameters of a class's ``forward``; kept, as looking takes long and every forward asks."""
    return [n for n in inspect.signature(forward).parameters if n != "self"]


#: What the installed transformers calls it.
CACHE = cache_argument(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)


@dataclass
class Frame:
    """The forward that is under way in this thread: its cache (None: dense), the implementation that the model had
    before, the module whose hook opened it, and the forward of another model that it interrupts."""

    cache: KVCache | None
    original: str
    model: nn.Module
    opener: nn.Module
    previous: Frame | None


_local = threading.local()


def current_frame() -> Frame | None:
    return getattr(_local, "frame", None)


def set_frame(frame: Frame | None) -> None:
    _local.frame = frame


def no_grad() -> contextlib.AbstractContextManager[Any]:
    """``torch.no_grad()``, unless gradients are off anyway, as within ``generate``: it costs 2 µs."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = contextlib.nullcontext()


@uncompiled  # bookkeeping of pages runs as Python; what lies between is compiled
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer over its pages; signature and result as transformers' attention functions have them.

    query [R, Hq, T, D]; key, value: what ``update()`` returned (or what the model made of it). Returns
    ``(out [R, T, Hq, Dv], None)``.
    """
    frame = current_frame()
    layer, dense = _layer_of(key, value), None
    if frame is None or frame.cache is None:
        options = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        given = {k: v for k, v in options.items() if v is not None}
        return _original(module, frame)(module, query, key, value, attention_mask, scaling=scaling, **given, **kwargs)
    if layer is None:
        layer = frame.cache.materialised_layer(getattr(module, "layer_idx", None), key, value, type(module).__name__)
        dense = (key, value)
    if position_bias is not None:
        raise ValueError(f"{type(module).__name__} passes position_bias, which kvcache does not support yet")
    ask = Attention(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(softcap or 0.0),
        sinks=None if s_aux is None else s_aux.detach().float().reshape(-1),
        mask=None if attention_mask is None else _as_bool(attention_mask),
    )
    with no_grad():
        absorption = absorption_of(module) if dense is None else None
        if absorption is not None:
            return absorption.attend(layer, query, key, ask), None
        part = None if layer.engine.step is None else layer.engine.step.part
        if part is not None:  # the layer runs on these rows alone
            return part.take(layer.engine.attend(layer, part.spread(query), ask, dense)), None
        return layer.engine.attend(layer, query, ask, dense), None


def _layer_of(key: Tensor, value: Tensor) -> Layer | None:
    """The layer that both keys and values still carry a handle to; None if the model transformed either."""
    layer = getattr(key, HANDLE, None)
    return layer if layer is getattr(value, HANDLE, None) else None


@uncompiled
def paged_mask(*args: Any, mask_function: Callable = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """None for causal and sliding patterns, which the engine applies itself; else the exact mask over seen columns."""
    frame = current_frame()
    if frame is None or frame.cache is None:
        name = "sdpa" if frame is None else frame.original
        return AttentionMaskInterface._global_mapping.get(name, sdpa_mask)(*args, mask_function=mask_function, **kwargs)
    if _is_plain(mask_function):
        return None
    return sdpa_mask(*args, mask_function=mask_function, **{**kwargs, "allow_is_causal_skip": False})


def _is_plain(mask_function: Callable) -> bool:
    """Whether a mask function is causal, alone or overlaid with a sliding window: told by its structure."""
    parts = [mask_function]
    if getattr(mask_function, "__qualname__", "").startswith("and_masks."):
        parts = list(mask_function.__closure__[0].cell_contents)  # type: ignore[index]
    return all(
        p is causal_mask_function or getattr(p, "__qualname__", "").startswith("sliding_window_overlay.") for p in parts
    )


def _as_bool(mask: Tensor) -> Tensor:
    """A 4D mask as bool (True: visible); an additive one must be 0 or hide."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError("attention_mask adds values other than 0 and -inf to the logits, which is not supported")
    return ~hidden


def _original(module: nn.Module, frame: Frame | None) -> Callable:
    """The attention function that the model would use without kvcache."""
    name = "sdpa" if frame is None else frame.original
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name == "eager" and eager is not None:
        return eager
    return ALL_ATTENTION_FUNCTIONS["sdpa" if name in ("eager", NAME) else name]


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, paged_mask)
