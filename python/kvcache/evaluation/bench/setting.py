"""What one model, batch and context are measured with: the contenders, and what a device measures by default."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ...wrap import wrap
from ..suite import share_weights
from .caches import Context, needs_prompt
from .contender import BASELINE, Contender, KVPress, Ours, Transformers
from .shapes import Shape

__all__ = ["CONTENDERS", "DEFAULTS", "PRESSES", "Setting", "default_policies", "pinned"]

#: A step's share of the context that TokenSelect reads.
SELECTED = 1 / 8
#: Groups of contenders that ``only`` chooses from, and what they are.
CONTENDERS = ("dynamic", "eager", "static", "compile", "quanto", "hqq", "fp8", "kvpress", "kvcache")
#: What is measured by default, by kind of device: models, batches, contexts, most tokens of a prompt that is read.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": ("llama-27m",), "batches": (1,), "contexts": (512, 2048, 8192), "prefill": 2048},
    "cuda": {
        "models": ("qwen3-4b", "llama-3-8b", "opt-6.7b"),
        "batches": (1, 4, 8),
        "contexts": (4096, 32768, 131072),
        "prefill": 32768,
    },
}
#: kvpress's contenders: (press, its arguments); 20 % kept, as by H2O.
PRESSES = (("SnapKVPress", {"compression_ratio": 0.8}), ("KnormPress", {"compression_ratio": 0.8}))


def default_policies(context: int, device: str = "cpu") -> list[str]:
    """Full, TokenSelect reading an eighth of the context, H2O with the paper's 20 %; on a GPU also 1,024 tokens."""
    budget = max(int(context * SELECTED), 8)
    sinks, local = min(16, budget // 4), budget // 4
    found = [
        "full",
        f"tokenselect(k={budget - local - sinks}, sinks={sinks}, local={local})",
        "h2o(heavy=0.1, recent=0.1)",
    ]
    if device == "cuda" and context > 4096:
        found.append("h2o(heavy=512, recent=512)")  # TRIM-KV's budget
    return found


@contextmanager
def pinned(wanted: bool = True) -> Iterator[int | None]:
    """Keep this process on one CPU; its number, or None where the system cannot."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    cpu = max(before)
    os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Setting:
    """One model, batch and context: what all of its contenders share."""

    shape: Shape
    model: PreTrainedModel
    context: Context
    room: int
    policies: Sequence[str]
    only: Sequence[str]
    prefill: int
    presses: Sequence[tuple[str, dict[str, Any]]]
    kvpress_python: str | None
    weights: Callable[[], Path]
    cpu: int | None
    left_out: dict[str, str] = field(default_factory=dict)

    def contenders(self) -> list[Contender]:
        """Those chosen by ``only``, not yet prepared. Reasons why others are not among them: ``left_out``."""
        model, context = self.model, self.context
        found: list[Contender] = []

        def theirs(kind: str, name: str, factory: Callable[[int], Any], which: PreTrainedModel = model, **more: Any):  # type: ignore[no-untyped-def]
            if kind in self.only:
                found.append(Transformers(name, context, model=which, factory=factory, room=self.room, **more))

        theirs("dynamic", BASELINE, lambda room: DynamicCache(config=model.config))
        if "eager" in self.only:
            eager = share_weights(model)
            eager.set_attn_implementation("eager")
            theirs("eager", "DynamicCache + eager", lambda room: DynamicCache(config=eager.config), eager)
        theirs("static", "StaticCache + sdpa", lambda room: StaticCache(config=model.config, max_cache_len=room))
        compiled = transformers.CompileConfig()
        compiled._compile_all_devices = True  # generate() compiles by itself on a GPU only
        theirs(
            "compile", "StaticCache + torch.compile", lambda room: StaticCache(config=model.config, max_cache_len=room),
            options={"compile_config": compiled},
        )  # fmt: skip
        for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq"), ("fp8", None)):
            if backend not in self.only:
                continue
            name = f"QuantizedCache {backend}" + ("" if package is None else " int4")
            if package is not None and not _installed(package):
                self.left_out[name] = f"{package} is not installed"
                continue
            theirs(backend, name, functools.partial(_quantized, backend, model))
        if "kvpress" in self.only:
            found += self._kvpress()
        if "kvcache" in self.only:
            wrapped = wrap(share_weights(model))
            for policy in self.policies:
                if needs_prompt(policy, model.config.num_hidden_layers) and context.length > self.prefill:
                    self.left_out[policy] = f"needs a real prompt; raise --prefill {self.prefill}"
                    continue
                found.append(Ours(policy, context, model=wrapped, policy=policy))
        return found

    def _kvpress(self) -> list[Contender]:
        names = {f"kvpress {p.removesuffix('Press')} {_arguments(a)}".strip(): (p, a) for p, a in self.presses}
        if self.kvpress_python is None:
            reason = "no --kvpress-python; make peers sets one up"
        elif self.shape.architecture == "OPTForCausalLM":
            reason = "kvpress does not support OPT"
        else:
            return [
                KVPress(
                    name, self.context, python=self.kvpress_python, shape=self.shape, weights=self.weights(), press=p,
                    arguments=a, read=self.context.length <= self.prefill, cpu_number=self.cpu,
                )
                for name, (p, a) in names.items()
            ]  # fmt: skip
        self.left_out |= dict.fromkeys(names, reason)
        return []


def _arguments(values: dict[str, Any]) -> str:
    """``{"compression_ratio": 0.8}`` as ``20%``, what a press keeps."""
    ratio = values.get("compression_ratio")
    return "" if ratio is None else f"{1 - ratio:.0%}"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _quantized(backend: str, model: PreTrainedModel, room: int) -> Any:
    cls = transformers.QuantizedCache
    return cls(backend, model.config) if backend == "fp8" else cls(backend, model.config, nbits=4)
