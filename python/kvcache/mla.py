"""Absorbed multi-head latent attention: queries go into the latent space instead of every entry out of it.

The cache of a DeepSeek-V2 style model stores one latent and one rotary key per token; the model expands them into keys
and values of all heads before each attention. That expansion is linear in the latent, so its key part can be applied to
the query and its value part to the output: attention then reads each latent once, for all heads. Source: DeepSeek-V2,
arXiv 2405.04434, section 2.1.2 ("absorb").

``expand_kv`` is replaced on the instances of attention modules whose expansion is recognised: by the source of their
``forward`` and by trying the expansion on random latents. Whether a step is absorbed is decided when its queries are
there; all others are expanded as the model does it.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compiling import uncompiled
from .layer_state import HANDLE
from .ops.validation import MAX_LATENT, MAX_ROPE
from .tiers import LayerPlan, index_of, is_update, tree_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .layer_state import Layer
    from .step import Attention

NAME = "expand_kv"
SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def absorbing_pays(tokens: int, entries: int, latent: int, rope: int, nope: int, value: int) -> bool:
    """Whether absorbing ``tokens`` queries takes fewer multiply-adds per head than expanding ``entries`` latents."""
    into = latent * (nope + value)  # one query, or one entry, through the projection
    absorbed = tokens * (into + entries * (2 * latent + rope))
    return absorbed < entries * (into + tokens * (nope + rope + value))


class Absorption:
    """Stands in for ``expand_kv`` of one attention module: entries of a layer pass through unexpanded."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.latent, self.nope, self.rope, self.value = (int(getattr(module, name)) for name in SIZES)

    @uncompiled  # handles are attributes that a graph would lose
    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        layer = getattr(kv_nope, HANDLE, None)
        if layer is not None and layer is getattr(k_rot, HANDLE, None):
            return kv_nope, k_rot
        return self.expand(kv_nope, k_rot)

    def expand(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [R, Hq, n, nope + rope] and values [R, Hq, n, value] as the model makes them."""
        original: Any = getattr(type(self.module), NAME)
        return original(self.module, kv_nope, k_rot)

    def projection(self, dtype: torch.dtype) -> Tensor | None:
        """The up-projection [Hq, nope + value, L]; None where it is not a plain matrix of ``dtype`` (any more)."""
        linear = self.module.kv_b_proj
        if (
            type(linear) is not nn.Linear
            or linear.bias is not None
            or linear.weight.dtype != dtype
            or linear.weight.is_meta
            or "forward" in linear.__dict__  # somebody's hook, as of offloaded weights
            or linear._forward_hooks
            or linear._forward_pre_hooks
            or linear.weight.shape[1] != self.latent
            or linear.weight.shape[0] % (self.nope + self.value)
        ):
            return None
        return linear.weight.view(-1, self.nope + self.value, self.latent)

    def attend(self, layer: Layer, q: Tensor, key: Tensor, ask: Attention) -> Tensor:
        """Attention output [R, T, Hq, value] of q [R, Hq, T, nope + rope] over the layer's latents.

        ``key``: what ``update()`` returned, in the dtype in which entries are expanded.
        """
        engine, tokens = layer.engine, q.shape[2]
        assert layer.store is not None
        weight = self.projection(q.dtype)
        pays = absorbing_pays(tokens, layer.store.max_count, self.latent, self.rope, self.nope, self.value)
        if weight is not None and weight.shape[0] == q.shape[1] and pays and engine.takes_latents(layer, ask):
            return engine.attend_latents(layer, q, ask, lambda q, ask: self._absorbed(layer, q, weight, ask))
        entries = (x.to(key.dtype) for x in engine.dense_slots(layer))
        return engine.attend(layer, q, replace(ask, expand=self.expand), self.expand(*entries))

    def _absorbed(self, layer: Layer, q: Tensor, weight: Tensor, ask: Attention) -> Tensor:
        rows, heads, tokens, _ = q.shape
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        # One product per head over all rows: the weights are used as they are.
        q_latent = q_nope.transpose(0, 1).reshape(heads, rows * tokens, self.nope) @ weight[:, : self.nope]
        q_latent = q_latent.view(heads, rows, tokens, self.latent).transpose(0, 1)
        out = layer.engine.read_latents(layer, q_latent, q_rope, ask)
        out = out.view(rows * tokens, heads, self.latent).transpose(0, 1) @ weight[:, self.nope :].transpose(1, 2)
        return out.transpose(0, 1).reshape(rows, tokens, heads, self.value)


def absorption_of(module: nn.Module) -> Absorption | None:
    """What stands in for the module's ``expand_kv``, if anything does."""
    found = module.__dict__.get(NAME)
    return found if isinstance(found, Absorption) else None


def with_absorbed(model: PreTrainedModel, plan: LayerPlan) -> LayerPlan:
    """The plan with the layers whose every attention module can be absorbed."""
    found: dict[int, bool] = {}
    for module in model.modules():
        index = index_of(module)
        if index is not None and plan.tiers.get(index) == "materialised" and hasattr(module, "kv_b_proj"):
            found[index] = found.get(index, True) and _recognised(module)
    return replace(plan, absorbed=frozenset(i for i, good in found.items() if good))


def absorb(model: PreTrainedModel, plan: LayerPlan) -> list[nn.Module]:
    """Make the attention modules of the plan's absorbed layers leave their entries unexpanded, until ``unwrap``."""
    modules: list[Any] = [m for m in model.modules() if index_of(m) in plan.absorbed and hasattr(m, "kv_b_proj")]
    for module in modules:
        module.expand_kv = Absorption(module)  # on the instance: the class stays as it is
    return modules


def _recognised(module: nn.Module) -> bool:
    if not callable(getattr(module, NAME, None)) or not _passes_expanded(type(module)):
        return False
    if not all(isinstance(getattr(module, name, None), int) for name in SIZES):
        return False
    absorption = Absorption(module)
    weight = absorption.projection(getattr(getattr(module.kv_b_proj, "weight", None), "dtype", torch.float32))
    if weight is None or absorption.latent > MAX_LATENT or absorption.rope > MAX_ROPE:
        return False
    return _expands_linearly(absorption, weight)


@torch.no_grad()
def _expands_linearly(absorption: Absorption, weight: Tensor) -> bool:
    """Whether two random latents are expanded as the projection says."""
    g = torch.Generator().manual_seed(0)
    latents, ropes = (
        torch.randn(1, 1, 2, n, generator=g).to(weight.device, weight.dtype)
        for n in (absorption.latent, absorption.rope)
    )
    keys, values = absorption.expand(latents, ropes)
    both = torch.einsum("hdl,nl->hnd", weight.float(), latents[0, 0].float())[None]
    k, v = both.split([absorption.nope, absorption.value], -1)
    want_k = torch.cat([k, ropes.float().expand(-1, k.shape[1], -1, -1)], -1)
    if keys.shape != want_k.shape or values.shape != v.shape:
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    size = max(float(want_k.abs().max()), float(v.abs().max()))
    errors = float((keys.float() - want_k).abs().max()), float((values.float() - v).abs().max())
    return max(errors) <= tolerance * size


def _passes_expanded(cls: type[nn.Module]) -> bool:
    """Whether ``cls.forward`` hands what it cached to ``expand_kv`` and that on to attention, and uses neither else."""
    tree = tree_of(cls.forward)
    if tree is None:
        return False
    cached: list[list[str]] = []
    expanded: list[list[str]] = []
    given: list[list[str]] = []
    passed: list[list[str]] = []
    after = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            targets = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            function = node.value.func
            if is_update(node.value):
                cached.append(targets)
                after = node.value.end_lineno or 0
            elif isinstance(function, ast.Attribute) and function.attr == NAME:
                expanded.append(targets)
                given.append([getattr(a, "id", "") for a in node.value.args])
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "attention_interface":
            passed.append([getattr(a, "id", "") for a in node.args[2:4]])
    if not (len(cached) == len(expanded) == 1 and given == cached and passed == expanded):
        return False
    # Behind the update each of the names is read once, by the calls above.
    loads = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.lineno > after)
    reads = sorted(n.id for n in loads if n.id in {*cached[0], *expanded[0]})
    return reads == sorted([*cached[0], *expanded[0]])
