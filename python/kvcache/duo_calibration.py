"""DuoAttention's calibration: one gate per kv head, between full and streaming attention, trained on a frozen model."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .calibration import check_texts
from .layers import wrapped_state
from .parallel import tensor_parallel
from .policies.budget import check_count
from .tiers import index_of, plan_layers
from .wrap import frozen_with

NAME = "kvcache_gated"
#: Of the calibration in this thread: gates (see _last_hidden), sinks, recent, and heads, layer -> its kv heads.
_local = threading.local()


def calibrate_duoattention(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    answer: int,
    share: float = 0.5,
    sinks: int = 128,
    recent: int = 256,
    steps: int = 2000,
    rate: float = 0.02,
    penalty: float = 0.05,
) -> Tensor:
    """Find the retrieval heads of a model and write the file that :class:`kvcache.DuoAttention` reads as ``heads``.

    Source: arXiv 2410.10819, section 2.3, and the official code. Every kv head gets a gate a in [0, 1] that is 1 at
    first; it attends with a * (attention to everything) + (1 - a) * (attention to the first ``sinks`` and the last
    ``recent`` tokens, and the token itself). The model stays as it is, and the gates are trained (AdamW) to reproduce
    its last hidden states over the answers: the loss is their mean squared difference plus ``penalty`` times the sum of
    all gates, which closes those of the heads that no answer needs.

    Arguments
        model: a model that :func:`kvcache.wrap` takes, not wrapped, whose layers all attend to everything.
        input_ids: int64 [rows, tokens] without padding, or several of these: long texts with passkeys in them (paper:
            ten) that end with the question and the answers, much longer than ``sinks`` + ``recent``.
        path: the file to write, ``.json`` or ``.safetensors``: which kv heads are retrieval heads, [layers, kv heads].
        answer: tokens at the end of each text over which hidden states are compared: those of the answers.
        share: of all kv heads of the model, those with the largest gates, that become retrieval heads; in (0, 1].
        sinks, recent: of the streaming heads, as in :class:`kvcache.DuoAttention`.
        steps, rate: of the training, one of ``input_ids`` after the other; the rate rises to ``rate`` over the first
            fifth of the steps and falls over the last.
        penalty: weight of the sum of the gates.

    Returns the gates [layers, kv heads] float32. Raises TypeError or ValueError, with the model untouched, for other
    arguments and models. Training keeps all activations of a text, and a mask [tokens, tokens].
    """
    target = Path(path)
    if target.suffix not in (".json", ".safetensors"):
        raise ValueError(f"path must end in .json or .safetensors, got {target}")
    texts = check_texts(input_ids)
    for name, count, least in (("answer", answer, 1), ("sinks", sinks, 0), ("recent", recent, 1), ("steps", steps, 1)):
        check_count(name, count, least)
    if any(text.shape[1] <= answer for text in texts):
        raise ValueError(f"answer must be less than the tokens of every text, got {answer}")
    for name, value, most in (("share", share, 1.0), ("rate", rate, None), ("penalty", penalty, None)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if most is not None and not 0 < value <= most:
            raise ValueError(f"{name} must be in (0, {most:g}], got {value!r}")
    _check_model(model)
    texts = [text.to(model.device) for text in texts]
    with _gated(model, sinks, recent):
        with torch.no_grad():
            wanted = [_last_hidden(model, text, answer, None) for text in texts]
        heads: dict[int, int] = _local.heads
        if len(set(heads.values())) != 1:
            raise ValueError(f"{type(model).__name__} has layers with different numbers of kv heads")
        gates = torch.ones(len(heads), heads[0], device=model.device, requires_grad=True)
        optimizer = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
        ramp = steps / 5
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))
            i = step % len(texts)
            found = _last_hidden(model, texts[i], answer, gates)
            loss = (found - wanted[i]).float().square().mean() + penalty * gates.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0)
    gates = gates.detach().cpu()
    order = gates.flatten().argsort(descending=True, stable=True)
    retrieval = torch.zeros(gates.numel(), dtype=torch.bool)
    retrieval[order[: max(round(share * gates.numel()), 1)]] = True
    retrieval = retrieval.view(gates.shape)
    if target.suffix == ".json":
        target.write_text(json.dumps(retrieval.tolist()))
    else:
        save_file({"retrieval": retrieval}, target)
    return gates


def _check_model(model: PreTrainedModel) -> None:
    """ValueError unless gates can be put into every layer of ``model``."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if wrapped_state(model) is not None:
        raise ValueError(f"{name} is wrapped: call kvcache.unwrap(model) first")
    plan = plan_layers(model)
    if set(plan.tiers.values()) != {"handle"}:
        raise ValueError(f"{name} has layers without queries and keys of their own: it cannot be calibrated")
    if any(window is not None for window in plan.windows):
        raise ValueError(f"{name} has layers with a sliding window, which have no retrieval heads")
    if tensor_parallel(model) is not None:
        raise ValueError(f"{name} is shared by tensor-parallel ranks: calibrate it on one")


@contextmanager
def _gated(model: PreTrainedModel, sinks: int, recent: int) -> Iterator[None]:
    """A frozen model with gates in its attention, for a block; afterwards it is what it was."""
    with frozen_with(model, NAME):
        _local.sinks, _local.recent, _local.heads = sinks, recent, {}
        try:
            yield
        finally:
            vars(_local).clear()


def _last_hidden(model: PreTrainedModel, text: Tensor, answer: int, gates: Tensor | None) -> Tensor:
    """Last hidden states [rows, answer, hidden] under ``gates`` [layers, kv heads]; None: all are 1."""
    _local.gates = gates
    return model.base_model(input_ids=text, use_cache=False)[0][:, -answer:]


def gated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention with gates; signature and result as transformers' attention functions have them.

    query [R, Hq, T, D], key, value [R, H, T, D] -> ([R, T, Hq, D], None).
    """
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}, which the calibration does not know")
    index, tokens, heads = index_of(module), query.shape[2], key.shape[1]
    assert index is not None
    _local.heads[index] = heads
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    if _local.gates is not None:
        place = torch.arange(tokens, device=query.device)
        age = place[:, None] - place
        seen = (age >= 0) & ((age <= _local.recent) | (place < _local.sinks))
        streaming = scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
        gate = _local.gates[index].repeat_interleave(query.shape[1] // heads)[:, None, None].to(out)
        out = gate * out + (1 - gate) * streaming
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, gated_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
