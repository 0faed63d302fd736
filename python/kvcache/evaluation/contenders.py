"""The policies that are compared, as text forms scaled to a context and a budget."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALL", "BASELINES", "BUDGET", "DEMO", "SINKS", "Contender", "contender", "contenders", "label", "scaled"]

#: First tokens that are protected where a policy protects any; StreamingLLM's number.
SINKS = 4
#: What ``kvcache demo`` shows.
DEMO = ("full", "streamingllm", "h2o", "tokenselect", "skipdecode")
#: Queries that vote together while a prompt is read: a question here has five tokens, and the mean of all five would
#: drown its last one, which the answer follows from.
CHUNK = 4
#: Newest tokens that random eviction protects, next to the sinks.
RANDOM_RECENT = 16
#: What ``kvcache eval`` adds: the comparisons of the papers.
BASELINES = ("window", "random")
#: What ``kvcache eval --compare all`` adds.
NEIGHBOURS = (
    *("streamingcache", "tova", "snapkv", "pyramidkv", "adakv", "criticalkv", "knorm", "keydiff", "lagkv"),
    *("expectedattention", "rkv", "emasink", "cam", "d2o", "kvmerger", "promptdistill", "gemfilter", "quest"),
)
ALL = (*DEMO, *BASELINES, *NEIGHBOURS)
#: What stands for the budget, in tokens, in a policy's text.
BUDGET = "{budget}"
#: Independent of the budget: nothing is evicted or selected.
UNBUDGETED = ("full", "skipdecode")


@dataclass(frozen=True)
class Contender:
    """A policy under a name for people, with the text form that runs; ``share`` of the context is its budget."""

    name: str
    label: str
    policy: str
    share: float


_LABELS = {
    "full": "Full cache",
    "streamingllm": "StreamingLLM",
    "h2o": "H2O",
    "tokenselect": "TokenSelect",
    "skipdecode": "SkipDecode",
    "window": "Window, no sinks",
    "random": "Random eviction",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "knorm": "KNorm",
    "keydiff": "KeyDiff",
    "lagkv": "LagKV",
    "expectedattention": "ExpectedAttention",
    "streamingcache": "StreamingLLM, cache positions",
    "criticalkv": "CriticalKV",
    "rkv": "R-KV",
    "emasink": "EMA-Sink",
    "cam": "CaM",
    "d2o": "D2O",
    "kvmerger": "KVMerger",
    "promptdistill": "PromptDistill",
    "gemfilter": "GemFilter",
    "quest": "Quest",
}


def contender(name: str, length: int, share: float, layers: int) -> Contender:
    """``name`` with a budget of ``share`` of ``length`` tokens, on a model of ``layers`` layers.

    Random eviction protects the sinks and a few recent tokens; without them it would lose to anything.
    TokenSelect's k and local stand about as the paper's defaults do. SkipDecode has no token budget: it runs three
    quarters of the layers at the end of the context. Policies that compress prompts only, by their papers, are held to
    the budget while decoding, too. PromptDistill and GemFilter choose at the end of the first third of the layers;
    Quest reads all in one layer of sixteen.
    """
    budget = max(round(length * share), 2 * SINKS + 2)
    half, local = budget // 2, budget // 4
    heavy = f"heavy={budget - half}, recent={half}"
    third = max(layers // 3 - 1, 0)
    window = f"keep={budget}, window={min(32, local)}, generated='evict'"
    texts = {
        "full": "full",
        "streamingllm": f"streamingllm(sinks={SINKS}, window={budget - SINKS})",
        "h2o": f"h2o({heavy})",
        "tokenselect": (
            f"tokenselect(k={budget - local - SINKS}, sinks={SINKS}, local={local}, chunk={min(local, CHUNK)})"
        ),
        "skipdecode": f"skipdecode(min_layers={max(1, layers * 3 // 4)}, max_layers={layers}, horizon={length})",
        "window": f"streamingllm(sinks=0, window={budget})",
        "random": f"randomeviction(keep={budget}, sinks={SINKS}, recent={min(RANDOM_RECENT, half)})",
        "tova": f"tova(keep={budget})",
        "snapkv": f"snapkv({window})",
        "pyramidkv": f"pyramidkv({window})",
        "adakv": f"adakv({window})",
        "knorm": f"knorm(keep={budget})",
        "keydiff": f"keydiff(keep={budget})",
        "lagkv": f"lagkv(keep={budget}, sinks={SINKS}, lag={min(128, local)})",
        "expectedattention": f"expectedattention(keep={budget}, sinks={SINKS})",
        "streamingcache": f"streamingllm(sinks={SINKS}, window={budget - SINKS}) | cachepositions",
        "criticalkv": f"criticalkv({window})",
        "rkv": f"rkv(keep={budget}, buffer={min(16, local)})",
        "emasink": f"emasink(sinks={SINKS}, window={budget - SINKS}, pinned=1)",
        "cam": f"cam({heavy})",
        "d2o": f"d2o({heavy})",
        "kvmerger": f"kvmerger({heavy})",
        "promptdistill": f"promptdistill(layer={third}, keep={budget - 1}, truncate=-1)",
        "gemfilter": f"gemfilter(layer={third}, keep={budget - 1})",
        "quest": f"quest(k={budget}, dense_layers={layers // 16})",
    }
    if name not in texts:
        raise ValueError(f"unknown contender {name!r}; one of {', '.join(texts)}")
    return Contender(name, _LABELS[name], texts[name], 1.0 if name in UNBUDGETED else share)


def scaled(text: str, length: int, shares: tuple[float, ...]) -> list[Contender]:
    """A policy's text with ``{budget}`` in it, at every budget."""
    return [Contender(text, text, text.replace(BUDGET, str(max(round(length * s), 1))), s) for s in shares]


def contenders(names: tuple[str, ...], length: int, shares: tuple[float, ...], layers: int) -> list[Contender]:
    """Every name at every budget; those without a budget once."""
    return [
        contender(name, length, share, layers) for name in names for share in ((1.0,) if name in UNBUDGETED else shares)
    ]


def label(name: str) -> str:
    """The name for people of a contender."""
    return _LABELS.get(name, name)
