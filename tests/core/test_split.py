"""Into how many pieces decode attention cuts a head's entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache._C import decode_splits


@pytest.mark.parametrize(
    ("threads", "rows", "heads", "max_count", "splits"),
    [
        (1, 1, 1, 100_000, 1),  # nobody to share with
        (8, 1, 8, 100_000, 1),  # one head each
        (8, 1, 2, 100_000, 4),
        (16, 1, 1, 100_000, 16),
        (7, 1, 3, 100_000, 7),  # 21 pieces in 3 rounds
        (16, 1, 1, 1_000, 3),  # pieces of at least 256 entries
        (16, 1, 1, 255, 1),
        (8, 0, 4, 1_000, 1),
        (8, 1, 4, 0, 1),
    ],
)
def test_examples(threads, rows, heads, max_count, splits):
    assert decode_splits(threads, rows, heads, max_count) == splits


@given(st.integers(1, 256), st.integers(0, 64), st.integers(0, 64), st.integers(0, 2**31 - 1))
def test_bounds(threads, rows, heads, max_count):
    assert 1 <= decode_splits(threads, rows, heads, max_count) <= max(1, min(64, max_count // 256))
