"""The policies that run through every oracle, small enough to decide much within a few dozen tokens."""

from __future__ import annotations

import itertools
from fractions import Fraction

import torch
from torch import Tensor

from kvcache import (
    D2O,
    H2O,
    RKV,
    TOVA,
    AdaKV,
    CachePositions,
    CaM,
    CriticalKV,
    DuoAttention,
    EMASink,
    ExpectedAttention,
    Full,
    GemFilter,
    KeyDiff,
    KNorm,
    KVMerger,
    LagKV,
    Policy,
    PromptDistill,
    PyramidKV,
    QFilters,
    Quest,
    RandomEviction,
    SkipDecode,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    TrimKV,
)
from kvcache.policies.compose import AXES
from support.gates import random_gates

LAYERS = 5
RETRIEVAL = ((True, False), (False, False), (False, True), (True, True), (False, False))
SELECT = {"k": 8, "sinks": 2, "local": 6, "reuse": 0.4, "chunk": 5}
SKIP = {"min_layers": 2, "max_layers": 4, "horizon": 70}


def filters_of(layers: int, heads: int) -> list:
    """Random filters [layers][heads][16]."""
    return torch.randn(layers, heads, 16, generator=torch.Generator().manual_seed(1)).tolist()


POLICIES: dict[str, Policy] = {
    "full": Full(),
    "streamingllm": StreamingLLM(sinks=2, window=9),
    "window": StreamingLLM(sinks=0, window=7),
    "h2o": H2O(6, 5),
    "h2o-max": H2O(6, 5, group="max"),
    "h2o-ratio": H2O(0.2, 0.15),
    "h2o-heavy": H2O(7, 0),
    "random": RandomEviction(9, sinks=1, recent=2, seed=3),
    "tokenselect": TokenSelect(**SELECT),
    "tokenselect-raw": TokenSelect(**SELECT, vote="raw"),
    "tokenselect-head": TokenSelect(**SELECT, vote="head"),
    "tokenselect-pool": TokenSelect(**SELECT, pool=3),
    "tokenselect-compact": TokenSelect(**SELECT, positions="compact"),
    "tokenselect-shortlist": TokenSelect(**SELECT, shortlist=1.0),  # of all pages: the exact selection
    "quest": Quest(32, 1),
    "quest|skipdecode": Quest(17, 0) | SkipDecode(**SKIP),
    "skipdecode": SkipDecode(**SKIP),
    "skipdecode-n_max": SkipDecode(**SKIP, prompt="n_max"),
    "skipdecode-schedule": SkipDecode(**SKIP, prompt="schedule", warmup=0),
    "h2o|skipdecode": H2O(6, 5) | SkipDecode(**SKIP),
    "skipdecode|tokenselect": SkipDecode(**SKIP) | TokenSelect(**SELECT),
    "skipdecode|compact": SkipDecode(**SKIP, prompt="n_max") | TokenSelect(**SELECT, positions="compact"),
    "knorm": KNorm(11, sinks=1, recent=3),
    "knorm|skipdecode": KNorm(11, sinks=1, recent=3) | SkipDecode(**SKIP),
    "qfilters": QFilters(filters_of(LAYERS, 2), 11, sinks=1, recent=3),
    "rkv": RKV(11, window=3, lam=0.4, buffer=4, pool=3),
    "rkv|skipdecode": RKV(0.3, window=2, lam=0.2, buffer=1) | SkipDecode(**SKIP),
    "keydiff": KeyDiff(11, sinks=1, recent=2),
    "keydiff-slack": KeyDiff(0.25, recent=3, slack=5),
    "keydiff|skipdecode": KeyDiff(11, recent=2, slack=3) | SkipDecode(**SKIP),
    "duoattention": DuoAttention(RETRIEVAL, sinks=2, recent=7),
    "duoattention|skipdecode": DuoAttention(RETRIEVAL, sinks=2, recent=7) | SkipDecode(**SKIP),
    "expectedattention": ExpectedAttention(11, horizon=30, sinks=1, recent=2),
    "expectedattention-slack": ExpectedAttention(0.2, horizon=9, sinks=2, slack=5),
    "expectedattention|skipdecode": ExpectedAttention(11, horizon=9, sinks=2) | SkipDecode(**SKIP),
    "lagkv": LagKV(15, sinks=2, lag=4),
    "lagkv-share": LagKV(0.5, sinks=0, lag=5),
    "lagkv|skipdecode": LagKV(11, sinks=1, lag=5) | SkipDecode(**SKIP),
    "tova": TOVA(11),
    "tova|skipdecode": TOVA(11) | SkipDecode(**SKIP),
    "snapkv": SnapKV(11, 4, 3),
    "snapkv-max": SnapKV(0.25, 5, 5, pooling="max"),
    "snapkv-evict": SnapKV(11, 4, 3, generated="evict"),
    "snapkv|skipdecode": SnapKV(11, 4, 3) | SkipDecode(**SKIP),
    "pyramidkv": PyramidKV(11, 4, 3, beta=4),
    "criticalkv": CriticalKV(11, 4, 3),
    "criticalkv|skipdecode": CriticalKV(11, 4, 3, generated="evict") | SkipDecode(**SKIP),
    "adakv": AdaKV(11, 4, 3),
    "adakv-evict": AdaKV(11, 4, 1, generated="evict"),
    "promptdistill": PromptDistill(1, 9),
    "promptdistill-stages": PromptDistill((0, 2), (0.5, 7), 3, truncate=1),
    "promptdistill-truncate": PromptDistill((0, 1, 3), (20, 15, 4), truncate=-1),
    "promptdistill|streamingllm": PromptDistill(1, 14) | StreamingLLM(sinks=2, window=9),
    "h2o|promptdistill": H2O(6, 5) | PromptDistill((1, 2), (16, 13)),
    "promptdistill|snapkv": PromptDistill(1, 15) | SnapKV(11, 4, 3),
    "gemfilter": GemFilter(2, 9),
    "gemfilter|streamingllm": GemFilter(1, 0.5) | StreamingLLM(sinks=2, window=9),
    "trimkv": TrimKV(random_gates(LAYERS), 11, slack=0, sinks=1, recent=2),
    "trimkv-global": TrimKV(random_gates(LAYERS), 11, slack=3, recent=2, allocation="global", floor=0.3),
    "trimkv|skipdecode": TrimKV(random_gates(LAYERS), 11, slack=2) | SkipDecode(**SKIP),
    "emasink": EMASink(sinks=4, window=7, alpha=0.7, pinned=1),
    "emasink|skipdecode": EMASink(sinks=3, window=8, alpha=0.9) | SkipDecode(**SKIP),
    "cam": CaM(6, 5, 4, seed=2),
    "d2o": D2O(6, 5),
    "kvmerger": KVMerger(6, 5, bandwidth=0.8),
    "h2o|cache": CachePositions() | H2O(6, 5),
    "emasink|cache": EMASink(sinks=4, window=7, alpha=0.7) | CachePositions(),
}

#: One of each kind. In whole generations the others run in ``make test-slow`` (tests/conftest.py).
EVERYDAY = (
    *("full", "streamingllm", "h2o", "tokenselect", "tokenselect-compact", "skipdecode", "h2o|skipdecode"),
    *("snapkv", "adakv", "adakv-evict", "keydiff-slack"),
)

#: The first of every class: these run through all oracles in ``make test``, variants in ``make test-slow``.
FIRST: dict[type, str] = {}
for _name, _policy in POLICIES.items():
    if not hasattr(_policy, "parts"):
        FIRST.setdefault(type(_policy), _name)

# The same kinds of policies with room for everything: they must change nothing.
GENEROUS: dict[str, Policy] = {
    "full": Full(),
    "streamingllm": StreamingLLM(sinks=4, window=200),
    "h2o": H2O(100, 100),
    "h2o-max": H2O(1.0, 40, group="max"),
    "random": RandomEviction(200),
    "tokenselect": TokenSelect(k=100, chunk=7),
    "tokenselect-compact": TokenSelect(k=100, chunk=7, positions="compact"),
    "tokenselect-just-enough": TokenSelect(k=61, sinks=1, local=4),
    "quest": Quest(80, 0),  # all pages
    "skipdecode": SkipDecode(LAYERS, LAYERS, prompt="schedule"),
    "h2o|skipdecode": H2O(100, 100) | SkipDecode(LAYERS, LAYERS, prompt="n_max"),
    "skipdecode|compact": SkipDecode(LAYERS, LAYERS) | TokenSelect(k=100, positions="compact"),
    "knorm": KNorm(200),
    "qfilters": QFilters(filters_of(LAYERS, 2), 200),
    "rkv": RKV(63, buffer=4),
    "keydiff": KeyDiff(60, recent=1, slack=6),  # the budget and its slack together are just enough
    "duoattention": DuoAttention(((True, True),) * LAYERS, sinks=1, recent=1),
    "duoattention-streaming": DuoAttention(((False, True),) * LAYERS, sinks=6, recent=60),
    "expectedattention": ExpectedAttention(66),
    "lagkv": LagKV(66, lag=3),
    "tova": TOVA(200),
    "snapkv": SnapKV(44, 8),  # the prompt, and what is generated stays
    "snapkv-evict": SnapKV(200, 8, generated="evict"),
    "pyramidkv": PyramidKV(200, 8, beta=2),
    "criticalkv": CriticalKV(44, 8),
    "adakv": AdaKV(44, 8),
    "promptdistill": PromptDistill((0, 2), (43, 0.98), truncate=-1),  # all but the last token of the prompt
    "gemfilter": GemFilter(4, 43),
    "promptdistill-last": PromptDistill(4, 1),  # no layer is left to drop tokens from
    "trimkv": TrimKV(random_gates(LAYERS), 60, slack=6),
    "trimkv-global": TrimKV(random_gates(LAYERS), 66, slack=0, allocation="global"),
    "emasink": EMASink(sinks=4, window=200),
    "cam": CaM(60, 6),
    "d2o": D2O(100, 100),
    "kvmerger": KVMerger(1.0, 22),
    "cache": Full() | CachePositions(),
    "h2o|cache": H2O(100, 100) | CachePositions(),
}


#: Axes of which a policy may decide only one, beside the same one twice; why, compose() says.
APART = (("retains", "selects"), ("schedules", "routes"), ("selects", "routes"), ("selects", "relocates"))


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names of (legal, illegal) combinations of two classes of policies, by the axes that they decide."""
    legal, illegal = [], []
    examples = {name: POLICIES[name] for name in FIRST.values()} | {"cache": CachePositions()}
    decides = {name: {axis for axis in AXES if getattr(p, axis)} for name, p in examples.items()}
    for a, b in itertools.combinations_with_replacement(examples, 2):
        if decides[a] and decides[b]:
            clash = decides[a] & decides[b] or any(
                (x in decides[a] and y in decides[b]) or (y in decides[a] and x in decides[b]) for x, y in APART
            )
            (illegal if clash else legal).append((a, b))
    return legal, illegal


def example(name: str) -> Policy:
    """The policy of a name of :func:`pairs`."""
    return CachePositions() if name == "cache" else POLICIES[name]


def part(policy: Policy, kind: type) -> Policy | None:
    """The part of ``policy`` that is a ``kind``."""
    return next((p for p in getattr(policy, "parts", (policy,)) if isinstance(p, kind)), None)


def usual(policy: Policy) -> str:
    """The model for a policy: qwen3, but not where norms decide, for it normalises its keys."""
    return "qwen3" if part(policy, KNorm) is None else "qwen2"


def depth(policy: SkipDecode, position: int) -> int:
    """SkipDecode's n(t) in exact arithmetic, half rounded up."""
    share = min(Fraction(position, policy.horizon), Fraction(1))
    return (policy.max_layers - (policy.max_layers - policy.min_layers) * share + Fraction(1, 2)).__floor__()


def active_layers(policy: SkipDecode, position: int, layers: int, in_prompt: bool) -> set[int]:
    """Layers that run at a position."""
    if in_prompt and policy.prompt == "full":
        return set(range(layers))
    n = policy.max_layers if in_prompt and policy.prompt == "n_max" else depth(policy, position)
    return {*range(policy.warmup), *range(layers - (n - policy.warmup), layers)}


def schedule(policy: Policy, tokens: int, prompt: int, layers: int = LAYERS):
    """A function layer -> bool [tokens]: who runs it; None when all do."""
    skip = part(policy, SkipDecode)
    if skip is None:
        return None

    def active(layer: int) -> Tensor:
        return torch.tensor([layer in active_layers(skip, t, layers, t < prompt) for t in range(tokens)])

    return active
