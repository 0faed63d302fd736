"""Cache policies: one idea, one file. See ``base.Policy`` for how to write another."""

from .adakv import AdaKV
from .axes import NEEDS, Merged, Selection
from .base import Policy
from .budget import Budget
from .cache_positions import CachePositions
from .cam import CaM
from .compose import compose
from .criticalkv import CriticalKV
from .d2o import D2O
from .duoattention import DuoAttention
from .emasink import EMASink
from .expected_attention import ExpectedAttention
from .full import Full
from .gemfilter import GemFilter
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .kvmerger import KVMerger
from .lagkv import LagKV
from .promptdistill import PromptDistill
from .pyramidkv import PyramidKV
from .qfilters import QFilters
from .quest import Quest
from .random_eviction import RandomEviction
from .rkv import RKV
from .skipdecode import SkipDecode
from .snapkv import SnapKV
from .streamingllm import StreamingLLM
from .text import parse_policy
from .tokenselect import TokenSelect
from .tova import TOVA
from .trimkv import TrimKV

__all__ = [
    "D2O",
    "H2O",
    "NEEDS",
    "RKV",
    "TOVA",
    "AdaKV",
    "Budget",
    "CaM",
    "CachePositions",
    "CriticalKV",
    "DuoAttention",
    "EMASink",
    "ExpectedAttention",
    "Full",
    "GemFilter",
    "KNorm",
    "KVMerger",
    "KeyDiff",
    "LagKV",
    "Merged",
    "Policy",
    "PromptDistill",
    "PyramidKV",
    "QFilters",
    "Quest",
    "RandomEviction",
    "Selection",
    "SkipDecode",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "TrimKV",
    "compose",
    "parse_policy",
]
