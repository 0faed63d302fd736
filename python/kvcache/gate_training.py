"""Trains retention gates (:class:`kvcache.Gates`) on a model that stays as it is.

The model runs twice over every batch: as it is (the teacher), and with attention in which every entry fades as its gate
says (the student). Nothing of the model is replaced, and only gates have gradients. Source: TRIM-KV, arXiv 2512.03324,
section 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from .attention import cache_argument, parameters_of
from .gate_attention import exchanged, forward, watched
from .gates import Gates, file_of
from .layers import hidden_modules, wrapped_state
from .parallel import tensor_parallel
from .policies.budget import check_count
from .tiers import plan_layers

__all__ = ["GateRecipe", "train_gates"]

_WARMUP = 20
#: Step -> tokens int64 [rows, T], and what each of them weighs as a target, float [rows, T].
Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GateRecipe:
    """How gates are trained. Defaults: what shows within minutes on small models; the paper trains at length with
    lr 2e-4, width 512, bias 18 and capacities of 256 to 4096.

    capacity: entries per head that the loss leaves unpunished (the paper's M); near the budget that is to be served.
    steps, length, batch: optimizer steps, tokens per sequence, sequences per step. Memory grows with length squared.
    lr: of AdamW; warms up over 20 steps and falls linearly to 0 over the last 40 %. weight_decay: likewise.
    capacity_weight: the weight of the capacity loss (the paper's lambda, 1).
    width, bias: see :class:`kvcache.Gates`. seed: of the gates and the data.
    """

    capacity: int = 128
    steps: int = 400
    length: int = 512
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.01
    capacity_weight: float = 1.0
    width: int = 64
    bias: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("steps", 1), ("length", 2), ("batch", 1), ("width", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("lr", "weight_decay", "capacity_weight", "bias"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or (name != "bias" and value < 0) or (name == "lr" and value == 0):
                raise ValueError(f"{name} must be a {'finite' if name == 'bias' else 'positive'} number, got {value}")


def losses(
    model: PreTrainedModel, gates: Gates, tokens: Tensor, weights: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student), cross entropy of the next token, capacity loss; the first two weighted by ``weights``."""
    with torch.no_grad():
        teacher = forward(model, tokens)[0][:, :-1].log_softmax(-1)
    logits, excess = forward(model, tokens, gates, capacity)
    student = logits[:, :-1].log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    surprise = F.nll_loss(student.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (divergence * weights[:, 1:]).sum(), (surprise * weights[:, 1:]).sum(), excess


def gate_shapes(model: PreTrainedModel, modules: dict[int, nn.Module]) -> dict[int, tuple[int, int]]:
    """Layer -> (size of the hidden state, kv heads), as a forward of two tokens shows them."""
    sizes: dict[int, int] = {}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    name = cache_argument(parameters_of(type(model).forward))
    tokens = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad(), watched(modules, lambda index, hidden: sizes.update({index: hidden.shape[-1]})):
        model(input_ids=tokens, use_cache=True, **{name: cache})
    return {index: (size, cache.layers[index].keys.shape[1]) for index, size in sorted(sizes.items())}


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step``, from 0."""
    return min(1.0, (step + 1) / _WARMUP) * min(1.0, (steps - step) / (0.4 * steps))


def train_gates(
    model: PreTrainedModel,
    out: str | Path,
    *,
    batches: Batches | None = None,
    text: str | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    save_every: int = 50,
    progress: Callable[[int, dict[str, float]], object] | None = None,
    **recipe: Any,
) -> Gates:
    """Train retention gates for ``model`` and write them to ``out``: ``trimkv(gates=out)`` uses them.

    Arguments
        model: a causal language model that is not wrapped, whose attention goes through transformers' interface. It is
            not changed. It may compute in any dtype; gates are float32.
        out: a file, or a folder for ``gates.safetensors``.
        batches: step -> (tokens int64 [rows, T], weights float [rows, T] of the tokens as targets). Default: ``text``
            where given, else tasks and documentation that are made on the spot (kvcache.evaluation.gate_data).
        text: text to train on in place of those, of ``length`` tokens at least.
        tokenizer: for the default data; None: that of ``model.name_or_path``.
        resume: go on from the checkpoint of an interrupted training, to the same gates bit for bit.
        save_every: steps between checkpoints, ``out`` with ``.state`` behind its name; it goes when training ends.
        progress: called with the step's number (from 1) and its losses ``kl``, ``ce`` and ``capacity``.
        recipe: fields of :class:`GateRecipe`.

    Raises TypeError or ValueError, before anything has changed, naming what is wrong.
    """
    settings = GateRecipe(**recipe)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if wrapped_state(model) is not None:
        raise ValueError(f"{type(model).__name__} is wrapped: call kvcache.unwrap(model) before its gates are trained")
    if len({p.device for p in model.parameters()}) > 1 or tensor_parallel(model) is not None:
        raise ValueError(f"{type(model).__name__} is spread over devices: gates are trained on one")
    plan = plan_layers(model)
    modules = hidden_modules(model, plan, "train_gates")
    for index, layer in enumerate(plan.layers):
        if plan.tiers[index] == "own" and not isinstance(layer, LinearAttentionLayer):
            raise ValueError(
                f"layer {index} of {type(model).__name__} reads another layer's entries, and would have to fade with "
                "them: gates are not trained for such models"
            )
    shapes = gate_shapes(model, modules)
    if batches is None:
        from .evaluation.gate_data import batches_for

        batches = batches_for(model, settings, text, tokenizer)
    file = file_of(out)
    state = file.with_name(file.name + ".state")
    if resume != state.exists():
        found = f"there is no {state}: nothing to resume" if resume else f"{state} is of an interrupted training"
        raise ValueError(found if resume else f"{found}: resume it, or remove that file to begin anew")
    device = model.device
    gates = Gates(shapes, settings.width, settings.bias, settings.seed).to(device)
    optimizer = torch.optim.AdamW(
        gates.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    about = {"model": type(model).__name__, "shapes": {str(k): list(v) for k, v in shapes.items()}, **asdict(settings)}
    about["data"] = hashlib.sha256(batches(0)[0].numpy().tobytes()).hexdigest()[:16]
    begin = _restore(state, about, gates, optimizer) if resume else 0
    with exchanged(model, modules):
        for step in range(begin, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _rate(step, settings.steps)
            # Each step draws its data anew from the seed and its number: what was drawn before is no state.
            tokens, weights = (x.to(device) for x in batches(step))
            kl, ce, excess = losses(model, gates, tokens, weights, settings.capacity)
            (kl + ce + settings.capacity_weight * excess).backward()
            nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % save_every == 0 and step + 1 < settings.steps:
                _save(state, {"about": about, "step": step + 1, "gates": gates.state_dict(),
                              "optimizer": optimizer.state_dict()})  # fmt: skip
            if progress is not None:
                progress(step + 1, {"kl": kl.item(), "ce": ce.item(), "capacity": excess.item()})
    gates.requires_grad_(False)
    gates.save(file, **about)
    state.unlink(missing_ok=True)
    return gates


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".new")
    torch.save(content, staging)
    staging.replace(path)


def _restore(path: Path, about: dict[str, Any], gates: Gates, optimizer: torch.optim.Optimizer) -> int:
    """Bring ``gates`` and ``optimizer`` to where a checkpoint was written; returns the steps done."""
    content = torch.load(path, weights_only=True)
    for name, value in about.items():
        if (then := content["about"].get(name)) != value:
            raise ValueError(
                f"{path} was begun with {name}={then!r}, not {value!r}: resume with what it was begun with"
            )
    gates.load_state_dict(content["gates"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["step"])
