"""Cache policies: one idea, one file. See ``base.Policy`` for how to write another."""

from .adakv import AdaKV
from .base import NEEDS, Merged, Policy, Selection
from .budget import Budget
from .cache_positions import CachePositions
from .cam import CaM
from .compose import compose
from .d2o import D2O
from .duoattention import DuoAttention
from .emasink import EMASink
from .expected_attention import ExpectedAttention
from .full import Full
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .kvmerger import KVMerger
from .lagkv import LagKV
from .pyramidkv import PyramidKV
from .random_eviction import RandomEviction
from .skipdecode import SkipDecode
from .snapkv import SnapKV
from .streamingllm import StreamingLLM
from .text import parse_policy
from .tokenselect import TokenSelect
from .tova import TOVA

__all__ = [
    "D2O",
    "H2O",
    "NEEDS",
    "TOVA",
    "AdaKV",
    "Budget",
    "CaM",
    "CachePositions",
    "DuoAttention",
    "EMASink",
    "ExpectedAttention",
    "Full",
    "KNorm",
    "KVMerger",
    "KeyDiff",
    "LagKV",
    "Merged",
    "Policy",
    "PyramidKV",
    "RandomEviction",
    "Selection",
    "SkipDecode",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "compose",
    "parse_policy",
]
