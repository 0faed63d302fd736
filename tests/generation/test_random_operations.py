"""Random operations of generation (append, crop, reorder, fork, evict, interrupted forwards): no page is leaked, no entry
is wrong. ``KVCACHE_OPERATIONS=100000`` runs that many, spread over the cases below; ten minutes on one core."""

import os

import pytest
import torch
from support.random_operations import Case, Machine

from kvcache import H2O, Full, RandomEviction, SkipDecode, StreamingLLM, TokenSelect

OPERATIONS = int(os.environ.get("KVCACHE_OPERATIONS", 10_000))
PIECE = 2_000  # operations of one seed

SKIP = SkipDecode(1, 2, 30)
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
    "skipdecode": Case(SKIP, (None, None), 1),
    "h2o|skipdecode": Case(H2O(4, 3) | SkipDecode(1, 2, 30, prompt="schedule", warmup=0), (None, None)),
    "streaming|skipdecode": Case(StreamingLLM(1, 6) | SKIP, (None, None), 16),
    "tokenselect": Case(TokenSelect(k=4, sinks=1, local=3, reuse=0.4, chunk=3)),
    "tokenselect|skipdecode": Case(TokenSelect(k=4, sinks=1, local=3, chunk=3) | SKIP, (None, None)),
}
#: What a run of 1,000 operations or more cannot have missed.
KINDS = {"decode", "several", "failing", "crop", "reorder", "fork", "drop", "record", "pickle", "reset", "prompt", "repeat"}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_cache_survives(name):
    left, seed = -(-OPERATIONS // len(CASES)), 0
    while left > 0:
        machine = Machine(CASES[name], seed)
        done = machine.run(min(left, PIECE))
        assert sum(done.values()) == min(left, PIECE)
        if left >= 1000:
            assert KINDS <= set(done)
        left, seed = left - PIECE, seed + 1
