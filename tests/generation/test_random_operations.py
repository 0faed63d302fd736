"""Random operations of generation (append, crop, reorder, fork, evict, interrupted forwards): no page is leaked, no
entry is wrong. ``KVCACHE_OPERATIONS=100000`` runs that many, spread over the cases below."""

import os

import pytest
import torch
from support.models import build
from support.random_operations import Case, Machine, ModelMachine

import kvcache
from kvcache import H2O, Full, RandomEviction, SkipDecode, StreamingLLM, TokenSelect

OPERATIONS = int(os.environ.get("KVCACHE_OPERATIONS", 6_000))
PIECE = 2_000  # operations of one seed

SKIP = SkipDecode(1, 2, 30)


class _LaterH2O(H2O):
    slack = 3


class _LaterRandom(RandomEviction):
    slack = 5


CASES = {
    "full": Case(Full(), page_size=1),
    "full, bfloat16": Case(Full(), (None,), dtype=torch.bfloat16),
    "full, window, stored in bfloat16": Case(Full(), (None, 5), kv_dtype=torch.bfloat16),
    "full, few pages": Case(Full(), max_tokens=60),
    "streaming": Case(StreamingLLM(2, 7), (None, 6), 3),
    "streaming, chunked": Case(StreamingLLM(1, 0.3), prefill="chunked"),
    "streaming, float16 stored in float32": Case(StreamingLLM(0, 7), dtype=torch.float16, kv_dtype=torch.float32),
    "streaming, few pages": Case(StreamingLLM(1, 5), (None, 7), 2, max_tokens=30),
    "h2o": Case(H2O(4, 3), page_size=2),
    "h2o, max, chunked": Case(H2O(0.3, 0.2, group="max"), (None, 9), 3, prefill="chunked"),
    "h2o, bfloat16": Case(H2O(4, 3), dtype=torch.bfloat16),
    "h2o, few pages": Case(H2O(4, 3), max_tokens=40),
    "random": Case(RandomEviction(7, sinks=1, recent=2, seed=3), (9, None)),
    "random, float16": Case(RandomEviction(0.5), page_size=8, dtype=torch.float16),
    "h2o with slack, few pages": Case(_LaterH2O(4, 3), page_size=2, max_tokens=50),
    "random with slack": Case(_LaterRandom(7, sinks=1, recent=2, seed=3), (9, None), 3),
    "random with slack, chunked, few pages": Case(_LaterRandom(5, recent=2), prefill="chunked", max_tokens=40),
    "random with slack|skipdecode": Case(_LaterRandom(5, sinks=1) | SKIP, (None, None), 2),
    "skipdecode": Case(SKIP, (None, None), 1),
    "h2o|skipdecode": Case(H2O(4, 3) | SkipDecode(1, 2, 30, prompt="schedule", warmup=0), (None, None)),
    "streaming|skipdecode": Case(StreamingLLM(1, 6) | SKIP, (None, None), 16),
    "tokenselect": Case(TokenSelect(k=4, sinks=1, local=3, reuse=0.4, chunk=3)),
    "tokenselect|skipdecode": Case(TokenSelect(k=4, sinks=1, local=3, chunk=3) | SKIP, (None, None)),
}
#: What a run of 1,000 operations or more cannot have missed.
KINDS = {
    "decode",
    "several",
    "failing",
    "crop",
    "reorder",
    "fork",
    "drop",
    "record",
    "pickle",
    "reset",
    "prompt",
    "repeat",
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_cache_survives(name):
    left, seed = -(-OPERATIONS // len(CASES)), 0
    while left > 0:
        machine = Machine(CASES[name], seed)
        done = machine.run(min(left, PIECE))
        assert sum(done.values()) == min(left, PIECE)
        if left >= 1000:
            assert set(done) >= KINDS
        left, seed = left - PIECE, seed + 1


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
MODELS = {
    "qwen3, full": ("qwen3", Case(Full(), max_tokens=300)),
    "qwen3, streaming, chunked": ("qwen3", Case(StreamingLLM(2, 7), page_size=3, prefill="chunked")),
    "mistral, h2o": ("mistral", Case(H2O(4, 3))),
    "gemma3, random": ("gemma3", Case(RandomEviction(7, sinks=1, recent=2), page_size=2)),
    "qwen3, h2o|skipdecode": ("qwen3", Case(H2O(4, 3) | SKIP)),
    "qwen3, tokenselect": ("qwen3", Case(TokenSelect(k=4, sinks=1, local=3, reuse=0.4, chunk=3))),
    "qwen3, compact": ("qwen3", Case(TokenSelect(k=9, sinks=1, local=3, positions="compact"))),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_a_model_survives(name):
    architecture, case = MODELS[name]
    sizes = {"sliding_window": 9} if architecture in ("mistral", "gemma3") else {}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"]} if architecture == "gemma3" else {}
    sizes |= {"query_pre_attn_scalar": 8} if architecture == "gemma3" else {}
    model = kvcache.wrap(build(architecture, **TINY, **sizes), case.policy)
    machine = ModelMachine(case, 0, model)
    operations = max(OPERATIONS // 100, 150)
    assert sum(machine.run(operations).values()) == operations
    assert kvcache.attention.current_frame() is None
