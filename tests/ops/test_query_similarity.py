"""query_similarity against torch in float64, and at the edges of float32."""

import pytest
import torch
from attention_case import DIMS
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, strided
from support.backends import examples

from kvcache import ops


@given(data=st.data())
@settings(max_examples=examples(100))
def test_query_similarity(backend, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    rows, heads, dim = (
        data.draw(st.integers(0, 3)),
        data.draw(st.sampled_from((1, 3, 32))),
        data.draw(st.sampled_from(DIMS)),
    )
    a, b = (torch.randn(rows, heads, dim, generator=g) for _ in range(2))
    b = a + data.draw(st.sampled_from((0.0, 0.1, 1.0, 100.0)), "noise") * b
    a, b = (x.to(data.draw(st.sampled_from(STORAGE_DTYPES))) for x in (a, b))
    if data.draw(st.booleans(), "strided"):
        a, b = strided(a[:, :, None])[:, :, 0], strided(b[:, None])[:, 0]
    got = ops.query_similarity(a, b)
    assert got.dtype == torch.float32
    want = torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1, eps=1e-8)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)


def test_query_similarity_at_the_edges(backend):
    """Zero, shorter than epsilon, and so long that products would overflow; a NaN stays in its row."""
    a = torch.ones(5, 2, 64) * torch.tensor([0.0, 1e-11, 1e17, NAN, 1.0])[:, None, None]
    b = torch.ones(5, 2, 64) * torch.tensor([1.0, 1e-11, -1e17, 1.0, 2.0])[:, None, None]
    got = ops.query_similarity(a, b)
    want = torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-8)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[3].isnan()
    assert got[4] == pytest.approx(1.0)
