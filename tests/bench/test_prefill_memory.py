"""The peak of a chunked prefill under an evicting policy is its budget and one chunk, as the bench measures it."""

import runpy
from pathlib import Path

import pytest

from kvcache.engine import Engine

BENCH = runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench/end_to_end/prefill_memory.py"))
LENGTH, CHUNK = 512, 64


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("full", 512), ("streamingllm(sinks=0, window=0.125)", 64), ("h2o(heavy=0.125, recent=0.125)", 128)],
)
def test_pages_of_the_peak(policy, kept):
    finish = Engine.finish
    found = BENCH["measure"](policy, LENGTH, CHUNK)
    assert Engine.finish is finish
    token = found["full"] // LENGTH
    assert found["full"] == 4 * 4 * 64 * 2 * 4 * LENGTH
    assert found["kept"] == kept
    assert found["pool"] == token * min(kept + CHUNK, LENGTH)  # all of them multiples of a page
    assert found["reserved"] >= found["pool"]
