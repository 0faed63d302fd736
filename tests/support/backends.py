"""The implementations of the ops that tests run with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import kvcache

from . import emulation
from .gpu_ops import GpuOps

HOST = [pytest.param("reference", marks=pytest.mark.reference), pytest.param("cpu", marks=pytest.mark.cpu)]
CUDA = [pytest.param("emulated", marks=pytest.mark.emulated), pytest.param("cuda", marks=pytest.mark.cuda)]


def examples(n: int) -> int:
    """Examples of a hypothesis test: ``n``, or that share of them which ``KVCACHE_EXAMPLES`` (percent) asks for.

    Builds that check every access to memory (tests/emulation) run fewer.
    """
    return max(1, n * int(os.environ.get("KVCACHE_EXAMPLES", "100")) // 100)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Ops run by "reference", "cpu", "emulated" (the CUDA kernels on the host) or "cuda"."""
    if name == "emulated":
        emulation.register()
    elif name == "cuda":
        if not (torch.cuda.is_available() and kvcache._C.cuda_info()["compiled"]):
            pytest.skip("no GPU, or kvcache built without nvcc")
        kvcache.ops.register_backend("cuda", GpuOps())
    with kvcache.ops.use_backend("native" if name == "cpu" else name):
        yield
