"""Attention in which entries fade as retention gates say, for their training: put in place of a model's own through
transformers' attention interface, while the hidden states that gates see are read by hooks.

Source: TRIM-KV, arXiv 2512.03324, section 4 (version 2, equation 3: the fading is added to the logits; version 1 and
the official code multiply logits by it, which leaves a forgotten token the logit 0 and not -inf).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .gates import Gates
from .tiers import index_of
from .wrap import frozen_with

__all__ = ["capacity_loss", "exchanged", "fading_attention", "forward", "watched"]

NAME = "kvcache_gates"


@dataclass
class _Run:
    """One forward with the exchanged attention. ``gates``: None for the teacher."""

    gates: Gates | None = None
    capacity: int = 0
    hidden: dict[int, Tensor] = field(default_factory=dict)
    excess: list[Tensor] = field(default_factory=list)  # per layer, the capacity loss


_run = _Run()


def fading_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k scale + (t - i) log beta_i) v; signature and result as transformers' attention functions have them.

    query [B, Hq, T, D], key, value [B, H, T, D]; attention_mask bool [B, 1, T, T]. Returns ([B, T, Hq, D], None).
    """
    heads, tokens = key.shape[1], query.shape[2]
    visible = attention_mask
    if visible is None:
        visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if _run.gates is None:
        bias = torch.zeros(visible.shape, device=query.device).masked_fill(~visible, float("-inf"))
    else:
        index = index_of(module)
        assert index is not None
        log_beta = _run.gates.log_beta(index, _run.hidden.pop(index))
        place = torch.arange(tokens, device=query.device)
        bias = (place[:, None] - place).clamp(min=0) * log_beta[:, :, None]  # [B, H, T, T]
        bias = bias.masked_fill(~visible, float("-inf"))
        _run.excess.append(capacity_loss(bias, _run.capacity))
    # What is of the size of all heads is passed over as seldom as can be: it is most of the time of a step.
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = (query.unflatten(1, (heads, -1)) @ key[:, :, None].transpose(-1, -2)).float()  # [B, H, group, T, T]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias[:, :, None]
    if s_aux is not None:
        sink = s_aux.float().view(1, heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None


def capacity_loss(fading: Tensor, capacity: int) -> Tensor:
    """mean over t of max(0, sum over i of beta_i ** (t - i) - ``capacity``) / t, with t from 1 (section 4).

    ``fading`` [B, H, T, T] float32: (t - i) log beta_i, -inf where query t does not see entry i.
    """
    remembered = fading.exp().sum(-1)
    return (F.relu(remembered - capacity) / torch.arange(1, fading.shape[2] + 1, device=fading.device)).mean()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, fading_attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def watched(modules: dict[int, nn.Module], note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it lasts, ``note`` is told the layer and the hidden states that enter its attention module."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: note(index, args[0] if args else kwargs["hidden_states"])

    handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def exchanged(model: PreTrainedModel, modules: dict[int, nn.Module]) -> Iterator[None]:
    """The model with the attention above, frozen and in eval mode; as it was afterwards."""
    with frozen_with(model, NAME), watched(modules, lambda index, hidden: _run.hidden.update({index: hidden})):
        yield


def forward(
    model: PreTrainedModel, tokens: Tensor, gates: Gates | None = None, capacity: int = 1
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, vocabulary] float32 of tokens [B, T], and the capacity loss, mean over layers and heads."""
    global _run
    _run = _Run(gates, capacity)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        excess = torch.stack([x.to(logits.device) for x in _run.excess]).mean() if _run.excess else logits.new_zeros(())
    finally:
        _run = _Run()
    return logits, excess
