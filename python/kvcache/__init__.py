"""kvcache: a paged, policy-driven KV cache for Hugging Face models.

>>> import kvcache
>>> kvcache.wrap(model, policy="h2o(heavy=0.1, recent=0.1)")  # doctest: +SKIP
>>> out = model.generate(**inputs, return_dict_in_generate=True)  # doctest: +SKIP
>>> print(out.past_key_values.report())  # doctest: +SKIP
"""

import torch  # noqa: F401  # first: _C looks torch's functions up in the process

from . import ops
from ._C import OutOfPages, PagePool
from .cache import KVCache
from .engine import PromptTooLong
from .layer_state import LayerView
from .policies import (
    D2O,
    H2O,
    TOVA,
    AdaKV,
    CachePositions,
    CaM,
    DuoAttention,
    EMASink,
    ExpectedAttention,
    Full,
    KeyDiff,
    KNorm,
    KVMerger,
    LagKV,
    Merged,
    Policy,
    PyramidKV,
    RandomEviction,
    Selection,
    SkipDecode,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    parse_policy,
)
from .report import Report
from .wrap import unwrap, wrap

__version__ = "0.1.0"
__all__ = [
    "D2O",
    "H2O",
    "TOVA",
    "AdaKV",
    "CaM",
    "CachePositions",
    "DuoAttention",
    "EMASink",
    "ExpectedAttention",
    "Full",
    "KNorm",
    "KVCache",
    "KVMerger",
    "KeyDiff",
    "LagKV",
    "LayerView",
    "Merged",
    "OutOfPages",
    "PagePool",
    "Policy",
    "PromptTooLong",
    "PyramidKV",
    "RandomEviction",
    "Report",
    "Selection",
    "SkipDecode",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "__version__",
    "ops",
    "parse_policy",
    "unwrap",
    "wrap",
]
