"""active_rows, gather_rows and scatter_rows: every backend against the reference, and worked examples."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import NAN, STORAGE_DTYPES, bits
from support.backends import examples

from kvcache import ops
from kvcache.ops import reference


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def test_worked_example(backend):
    mask = torch.tensor([False, True, False, True, True])
    index, count = ops.active_rows(mask)
    assert index.tolist() == [1, 3, 4, -1, -1]
    assert count.tolist() == [3]
    x = torch.arange(10.0).view(5, 2)
    picked = ops.gather_rows(x, index)
    assert picked.tolist() == [[2, 3], [6, 7], [8, 9], [0, 0], [0, 0]]
    ops.scatter_rows(x, -picked, index)
    assert x.tolist() == [[0, 1], [-2, -3], [4, 5], [-6, -7], [-8, -9]]


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 511, 512, 513, 8191, 8192, 8193, 20_000])
def test_active_rows_are_the_reference(backend, n):
    g = torch.Generator().manual_seed(n)
    for share in (-1.0, 0.0, 0.01, 0.5, 0.99, 1.0):
        mask = torch.rand(n, generator=g) <= share
        for got, want in zip(ops.active_rows(mask), reference.active_rows(mask)):
            assert got.dtype == torch.int32
            assert torch.equal(got, want)


@settings(max_examples=examples(100))
@given(
    n=st.integers(1, 40),
    m=st.integers(0, 50),
    dim=st.sampled_from([0, 1, 2, 3, 7, 8, 64, 100, 1000, 4096]),
    dtype=st.sampled_from(STORAGE_DTYPES),
    seed=st.integers(0, 2**31),
)
def test_gather_and_scatter_are_the_reference(backend, n, m, dim, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g).to(dtype)
    x[0] = NAN
    index = torch.randint(-1, n, (m,), generator=g).int()
    got, want = ops.gather_rows(x, index), reference.gather_rows(x, index)
    assert got.dtype == dtype
    assert torch.equal(bits(got), bits(want))
    once = torch.cat([torch.randperm(n, generator=g).int(), torch.full((3,), -1, dtype=torch.int32)])
    once = once[torch.randperm(len(once), generator=g)][:m]
    rows = torch.randn(len(once), dim, generator=g).to(dtype)
    y = x.clone()
    ops.scatter_rows(x, rows, once)
    reference.scatter_rows(y, rows, once)
    assert torch.equal(bits(x), bits(y))


def test_rows_beyond_32_bits(fast_backend):
    dim = 4096
    n = 2**31 // dim + 3
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    x = torch.frombuffer(mmap.mmap(-1, 2 * n * dim, flags=flags), dtype=torch.float16).view(n, dim)
    rows, index = torch.randn(3, dim).half(), ints([n - 1, -1, n - 2])
    ops.scatter_rows(x, rows, index)
    assert torch.equal(x[-1], rows[0])
    assert torch.equal(x[-2], rows[2])
    assert x[0].eq(0).all()
    picked = ops.gather_rows(x, index)
    assert torch.equal(picked[[0, 2]], rows[[0, 2]])
    assert picked[1].eq(0).all()


@pytest.mark.slow
def test_many_rows(fast_backend):
    n = 70_000
    x, index = torch.arange(2.0 * n).view(n, 2), torch.randperm(n).int()
    picked = ops.gather_rows(x, index)
    assert torch.equal(picked, x[index.long()])
    ops.scatter_rows(x, -picked, index)
    assert torch.equal(x, -torch.arange(2.0 * n).view(n, 2))


def test_views_may_begin_anywhere(backend):
    """Rows that are not aligned to what the kernels would like to move at once."""
    for dtype in STORAGE_DTYPES:
        x = torch.randn(8 * 16 + 1).to(dtype)[1:].view(8, 16)
        index = ints([3, -1, 0])
        assert torch.equal(ops.gather_rows(x, index), reference.gather_rows(x, index))
