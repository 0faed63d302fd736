"""How a model's layers use their cache, read off its configuration and its source.

Tiers of a layer
    "handle": attention reads the pages through transformers' attention interface.
    "materialised": the same, but the model transforms keys or values after the cache (MLA) and gets them densely.
    "pre-hook": the model computes attention itself; it gets keys and values of all seen columns densely, and what the
        policy dropped is hidden from its softmax (kvcache.self_attending).
    "own": a layer that stays as transformers has it: a recurrent state, or one that reads another layer's entries.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_HEAD_SIZE = 256
#: Attributes in which transformers' attention modules keep the index of their layer.
INDEX_NAMES = ("layer_idx", "layer_id")
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
#: transformers' layers whose keys and values we page; all but the plain ones keep something of another kind besides.
PAGED = (
    *PLAIN,
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
#: Layers that stay transformers'; 5.17 has no DummyLayer, and no layer at all for those that read another's entries.
OWN = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None))

#: Model types whose forward does with the cache what no other does; told before their first forward.
UNSERVED = {
    "cpmant": "caches a learned prompt in columns before the tokens that it is given",
    "dory": "runs layers in a loop and appends layers of its own to the cache",
    "xlm": "is given all tokens at every step and decides itself which of them are new",
}


@dataclass(frozen=True)
class LayerPlan:
    """What every cache layer of a model is: its window (None: full attention), its tier, what transformers keeps."""

    windows: list[int | None]
    tiers: dict[int, str]
    layers: list[Any]  # transformers' own, never filled
    absorbed: frozenset[int] = frozenset()  # materialised layers whose queries can go into the latent space (mla.py)

    @property
    def self_attending(self) -> bool:
        """Whether the model computes attention itself."""
        return "pre-hook" in self.tiers.values()

    @property
    def unskippable(self) -> int | None:
        """A layer that has to run for every token, because it keeps more than entries or reads those of another."""
        return next((i for i, layer in enumerate(self.layers) if type(layer) not in PLAIN), None)

    @property
    def materialised(self) -> frozenset[int]:
        return frozenset(i for i, tier in self.tiers.items() if tier == "materialised")


def plan_layers(model: PreTrainedModel) -> LayerPlan:
    """The plan of a model; ValueError names the layer that kvcache cannot serve, and why."""
    name = type(model).__name__
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"{name} uses a cache of its own, which kvcache cannot stand in for")
    if (reason := UNSERVED.get(model.config.model_type)) is not None:
        raise ValueError(f"{name} {reason}: kvcache does not support this model")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    windows: list[int | None] = []
    paged: list[int] = []
    for i, layer in enumerate(layers):
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        windows.append(int(layer.sliding_window) if sliding else None)
        if type(layer) in OWN:
            continue
        if type(layer) not in PAGED:
            raise ValueError(
                f"{name}: layer {i} keeps its state in a {type(layer).__name__}, which kvcache does not support yet"
            )
        paged.append(i)
    if not paged:
        raise ValueError(
            f"{name} has nothing to page: its layers keep recurrent states, not keys and values "
            f"(layer 0: {type(layers[0]).__name__})"
            if layers
            else f"{name} has no layers that use a cache"
        )
    found, reason = _interface_tiers(model, paged)
    if any(type(layers[i]) is DynamicIndexedLayer for i in paged):
        found, reason = None, f"{name} selects by indexers of its own"
    if found is None:
        found = _self_attending(model, paged, reason)
    tiers = {i: found.get(i, "own") for i in range(len(layers))}
    return LayerPlan(windows, tiers, list(layers))


def index_of(module: nn.Module) -> int | None:
    """The layer that a module says it belongs to."""
    for name in INDEX_NAMES:
        index = getattr(module, name, None)
        if isinstance(index, int) and not isinstance(index, bool):
            return index
    return None


def _interface_tiers(model: PreTrainedModel, paged: list[int]) -> tuple[dict[int, str] | None, str]:
    """Tiers of layers that use transformers' attention interface; None and why, where one of them does not."""
    if not model._can_set_attn_implementation():
        return None, f"{type(model).__name__} does not use transformers' attention interface"
    found: dict[int, bool] = {}
    for module in model.modules():
        index = index_of(module)
        if index is None or index not in paged:
            continue
        transforms = _transforms_after_update(type(module))
        if transforms is None:
            continue
        size = getattr(module, "head_dim", 0)
        if isinstance(size, int) and size > MAX_HEAD_SIZE:
            return None, f"{type(module).__name__} of layer {index} has heads of {size}, more than {MAX_HEAD_SIZE}"
        found[index] = found.get(index, False) or transforms
    missing = [i for i in paged if i not in found]
    if missing:
        return None, f"layer {missing[0]} has no attention module that calls the interface as kvcache knows it"
    return {i: "materialised" if transforms else "handle" for i, transforms in found.items()}, ""


def _self_attending(model: PreTrainedModel, paged: list[int], reason: str) -> dict[int, str]:
    name = type(model).__name__
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in ("eager", "sdpa", None):
        raise ValueError(
            f"{reason}, and with attn_implementation={implementation!r} nothing can be hidden from its attention: "
            "load it with attn_implementation='sdpa' or 'eager'"
        )
    found = {index_of(m) for m in caching_modules(model)}
    missing = [i for i in paged if i not in found]
    if missing:
        kinds = sorted({type(m).__name__ for m in model.modules() if index_of(m) in missing})
        raise ValueError(
            f"{name}: {reason}, and layer {missing[0]} has no module that calls update() of the cache "
            f"(modules of that layer: {', '.join(kinds) or 'none found'}); kvcache does not support this model yet"
        )
    return dict.fromkeys(paged, "pre-hook")


def caching_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose own ``forward`` puts keys and values into the cache."""
    return [m for m in model.modules() if index_of(m) is not None and _calls_update(type(m))]


def interface_modules(model: nn.Module, layers: Collection[int]) -> list[tuple[int, nn.Module]]:
    """(layer, module) of the modules that attend through transformers' interface in ``layers``."""
    found = [(index_of(m), m) for m in model.modules()]
    return [(i, m) for i, m in found if i is not None and i in layers and _transforms_after_update(type(m)) is not None]


@functools.cache  # a class has many modules in a model, and is asked about more than once
def tree_of(forward: Callable) -> ast.AST | None:
    """The source of a function; None where there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None


def is_update(node: ast.AST) -> bool:
    """Whether it calls ``update()`` of something: a cache, in an attention module."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"


def _calls_update(cls: type[nn.Module]) -> bool:
    tree = tree_of(cls.forward)
    return tree is not None and any(is_update(n) for n in ast.walk(tree))


def _transforms_after_update(cls: type[nn.Module]) -> bool | None:
    """Whether ``cls.forward`` changes keys or values after caching them; None if it does no cached attention."""
    tree = tree_of(cls.forward)
    if tree is None:
        return None
    names: list[str] | None = None
    updated = called = 0
    passed: list[str | None] = []
    mask: str | None = None
    assigned: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            if is_update(node.value):
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
            if "position_bias" in by_name:  # an additive bias per entry: known to the model's own function only
                return None
    if names is None or not called or mask != "attention_mask":  # Doge makes a mask of its own
        return None
    return passed != names or any(n in names and updated < line < called for line, n in assigned)
