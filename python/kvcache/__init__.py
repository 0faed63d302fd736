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
from .calibration import calibrate_qfilters
from .duo_calibration import calibrate_duoattention
from .engine import PromptTooLong
from .gate_training import GateRecipe, train_gates
from .gates import Gates
from .kvzip import compress
from .layer_state import LayerView
from .policies import (
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
    Merged,
    Policy,
    PromptDistill,
    PyramidKV,
    QFilters,
    Quest,
    RandomEviction,
    Selection,
    SkipDecode,
    SnapKV,
    StreamingLLM,
    TokenSelect,
    TrimKV,
    parse_policy,
)
from .report import Report
from .wrap import unwrap, wrap

__version__ = "0.1.0"
__all__ = [
    "D2O",
    "H2O",
    "RKV",
    "TOVA",
    "AdaKV",
    "CaM",
    "CachePositions",
    "CriticalKV",
    "DuoAttention",
    "EMASink",
    "ExpectedAttention",
    "Full",
    "GateRecipe",
    "Gates",
    "GemFilter",
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
    "PromptDistill",
    "PromptTooLong",
    "PyramidKV",
    "QFilters",
    "Quest",
    "RandomEviction",
    "Report",
    "Selection",
    "SkipDecode",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "TrimKV",
    "__version__",
    "calibrate_duoattention",
    "calibrate_qfilters",
    "compress",
    "ops",
    "parse_policy",
    "train_gates",
    "unwrap",
    "wrap",
]
