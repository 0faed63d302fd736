"""Retention gates with random weights: betas spread so far that they decide much within a few dozen tokens."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from kvcache import Gates


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="kvcache-gates-")  # gone with the process


@functools.cache
def random_gates(layers: int, heads: int = 2, hidden: int = 64, seed: int = 0) -> str:
    """The file of gates for ``layers`` layers, which are different for every layer and head."""
    gates = Gates(dict.fromkeys(range(layers), (hidden, heads)), width=16, bias=3.0, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for gate in gates.layers.values():
            gate.outer.weight.normal_(0.0, 2.0, generator=generator)
    return str(gates.save(Path(_folder().name) / f"{layers}-{heads}-{hidden}-{seed}.safetensors"))
