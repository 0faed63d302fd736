"""Models that compute attention themselves, without transformers' attention interface (Bloom, MPT, Falcon, GPT-Neo, …).

Their attention modules get keys and values of every seen column, zeros where the policy dropped an entry, so that
masks, ALiBi and buffers of the model stay as they are; while such a module runs, its softmax is watched: columns
without an entry are hidden from it, and the probabilities are collected for policies that need them. Bytes are saved
as everywhere; the time of a step is the model's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import current_frame
from .step import Counted
from .tiers import caching_modules, index_of

if TYPE_CHECKING:
    from .engine import Engine
    from .layer_state import Layer
    from .step import Step

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass
class SlotProbabilities:
    """Probabilities that queries at ``positions`` [R, T] gave to entries: [R, H, T, slots], reduced over the group."""

    values: Tensor
    positions: Tensor
    counted: Counted

    def collect(self, engine: Engine, layer: Layer, limits: Tensor | None = None) -> None:
        """Add them to the scores; of queries at or beyond ``limits`` [R] nothing (rejected drafts)."""
        valid = self.positions >= 0
        if limits is not None:
            valid &= self.positions < limits[:, None]
        keep = self.counted.keep_of(valid.any(1))
        if self.counted.last:
            valid &= valid.flip(1).cumsum(1).flip(1) <= self.counted.last
        sums = torch.where(valid[:, None, :, None], self.values, 0.0).sum(2)
        engine._add_scores(layer, sums, keep)

    def select_rows(self, rows: Tensor) -> SlotProbabilities:
        """Of the rows ``rows`` [R'] int64 alone."""
        return SlotProbabilities(self.values[rows], self.positions[rows], self.counted)


class Watch(TorchFunctionMode):
    """Sees the softmax of one attention module: hides columns without an entry and collects probabilities."""

    def __init__(self, engine: Engine, layer: Layer) -> None:
        super().__init__()
        self.engine, self.layer = engine, layer
        self.columns: Tensor | None = None  # [R, H, slots] the column of each entry, once update() has stored the new
        self.visible: Tensor | None = None  # [R, H, columns seen] bool
        self.seen = 0

    def show(self, columns: Tensor, visible: Tensor) -> None:
        self.columns, self.visible = columns, visible

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.visible is not None and func in SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            hidden = self._hidden(scores)
            if hidden is not None and dim in (-1, scores.ndim - 1):
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
                given = {k: v for k, v in kwargs.items() if k != "input"}
                out = func(scores, *args[1:], **given)
                self._collect(out)
                return out
        if self.visible is not None and func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _hidden(self, scores: Tensor) -> Tensor | None:
        """Which of ``scores`` [R, Hq, T, columns] or [R * Hq, T, columns] have no entry; None: not attention scores."""
        assert self.visible is not None
        rows, heads, columns = self.visible.shape
        if scores.shape[-1] != columns or scores.ndim not in (3, 4) or not scores.is_floating_point():
            return None
        queries = scores.shape[1] if scores.ndim == 4 else scores.shape[0] // rows
        outer = scores.shape[0] if scores.ndim == 4 else scores.shape[0] / max(queries, 1)
        if outer != rows or queries == 0 or queries % heads:
            return None
        hidden = ~self.visible.repeat_interleave(queries // heads, 1)[:, :, None]
        return hidden if scores.ndim == 4 else hidden.reshape(rows * queries, 1, columns)

    def _collect(self, probabilities: Tensor) -> None:
        self.seen += 1
        policy, step = self.engine.policy, self.engine.step
        if step is None or step.counted is None:
            return
        assert self.visible is not None
        assert self.columns is not None
        rows, heads, columns = self.visible.shape
        tokens = step.tokens  # transformers' sdpa may pack the heads of a group into the dimension of the queries
        p = probabilities.detach().float().reshape(rows, heads, -1, tokens, columns)
        p = p.amax(2) if policy.group_reduction == "max" else p.mean(2)
        slots = self.columns[:, :, None].expand(-1, -1, tokens, -1)
        positions = step.on(p.device, step.positions)
        active = step.routed.get(self.layer.index)
        if active is not None:
            positions = torch.where(step.on(p.device, active), positions, -1)
        found = SlotProbabilities(p.gather(3, slots), positions, step.counted)
        if self.engine.recording:
            self.layer.pending.append(found)
        else:
            found.collect(self.engine, self.layer)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's attention with the hidden columns hidden; written out, so that probabilities can be collected."""
        tokens, columns = query.shape[-2], key.shape[-2]
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query.float() @ key.float().transpose(-1, -2)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        hidden = self._hidden(scores)
        if hidden is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        least = torch.finfo(scores.dtype).min
        if is_causal:
            causal = torch.ones(tokens, columns, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~causal, least)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, least)
            else:
                scores = scores + attn_mask.float()
        probabilities = torch.softmax(scores.masked_fill(hidden, least), -1)
        self._collect(probabilities)
        return probabilities.to(value.dtype) @ value


class WatchedForward:
    """Stands for ``forward`` of an attention module that computes attention itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        functools.update_wrapper(self, type(module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame, forward = current_frame(), type(self.module).forward
        index = index_of(self.module)
        if frame is None or frame.cache is None or index is None:
            return forward(self.module, *args, **kwargs)
        policy = frame.cache.policy
        if not (policy.retains or policy.schedules or policy.needs):
            return forward(self.module, *args, **kwargs)
        layer = frame.cache.engine.layers[index]
        layer.watch = Watch(frame.cache.engine, layer)
        try:
            with layer.watch:
                out = forward(self.module, *args, **kwargs)
            if layer.watch.visible is not None and not layer.watch.seen:
                raise RuntimeError(
                    f"{type(self.module).__name__} (layer {index}) attends without torch's softmax or "
                    f"scaled_dot_product_attention: policy {policy} cannot hide from it what was dropped"
                )
        finally:
            layer.watch = None
        return out


def watch_modules(model: nn.Module) -> list[nn.Module]:
    """Watch the attention modules of a model until ``forward`` is taken off the instances again."""
    modules = caching_modules(model)
    for module in modules:
        module.forward = WatchedForward(module)  # on the instance: the class stays as it is
    return modules


def dense_columns(layer: Layer, step: Step) -> tuple[Tensor, Tensor]:
    """Keys and values of ``layer`` by seen column, [R, H, columns, D]; zero where there is no entry."""
    store = layer.store
    assert store is not None
    total = step.start + step.tokens
    keys, values = store.gather("keys"), store.gather("values")
    if layer.watch is None and store.max_count == total and int(store.counts_host.min()) == total:
        return keys, values  # slots are columns: nothing was ever padding or dropped
    width = keys.shape[2]
    positions = store.positions[..., :width]
    live = torch.arange(width, device=keys.device) < store.counts[..., None]
    columns = torch.where(live, step.column_of(torch.where(live, positions, 0)), total)
    visible = torch.zeros(*columns.shape[:2], total + 1, dtype=torch.bool, device=keys.device)
    visible.scatter_(2, columns, True)
    if layer.watch is not None:
        # Dead slots point at a column that exists; their probability is never read.
        layer.watch.show(columns.clamp(max=total - 1), visible[..., :total])
    spread = []
    for x in (keys, values):
        out = x.new_zeros(*x.shape[:2], total + 1, x.shape[3])
        out.scatter_(2, columns[..., None].expand(x.shape), x)
        spread.append(out[:, :, :total])
    return spread[0], spread[1]
