"""The physical limit of a decode step, and what caches hold and read, in bytes."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import _C
from ...cache import KVCache
from ...layers import decoder_layers
from ..suite import entries_read

__all__ = [
    "allocated_bytes",
    "cache_bytes",
    "entry_bytes",
    "free_memory",
    "kv_heads",
    "read_bandwidth",
    "step_bytes",
    "weight_bytes",
]


def read_bandwidth(device: torch.device | str = "cpu", size: int = 256 << 20, repeats: int = 15) -> float:
    """Bytes per second that the device's memory gives: best of ``repeats`` passes over ``size`` bytes.

    On a CPU with the kernels' own streaming read and as many threads as torch has (one thread: its processor time); on
    a GPU a sum over at least 2 GiB.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_bandwidth(device, max(size, 2 << 30), repeats)
    threads = torch.get_num_threads()
    block = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        if threads == 1:
            begin = time.thread_time()
            _C.probe_read(block.data_ptr(), size)
            best = min(best, time.thread_time() - begin)
        else:
            best = min(best, _together(block, threads))
    return size / best


def _together(block: Tensor, threads: int) -> float:
    """Seconds that ``threads`` readers of a part each take for all of ``block``."""
    share = block.nbytes // threads // 4096 * 4096
    readers = [
        threading.Thread(target=_C.probe_read, args=(block.data_ptr() + i * share, share)) for i in range(threads)
    ]
    begin = time.perf_counter()
    for r in readers:
        r.start()
    for r in readers:
        r.join()
    return (time.perf_counter() - begin) * block.nbytes / (share * threads)


def _cuda_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    block = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        block.sum()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return size / best


def weight_bytes(model: PreTrainedModel, layers: float | None = None) -> float:
    """Bytes of weights that one decode step reads: all but the tables of embeddings, of which it reads a row.

    ``layers``: how many decoder layers run, if not all; a mean over steps may be a fraction. A table that is also the
    output projection is read.
    """
    head = model.get_output_embeddings()
    tables = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, torch.nn.Embedding) and (head is None or m.weight is not head.weight)
    }
    total = float(sum(p.nbytes for p in model.parameters() if id(p) not in tables))
    if layers is not None:
        found = decoder_layers(model, model.config.num_hidden_layers)
        each = sum(p.nbytes for x in found for p in x.parameters()) / len(found)
        total -= (len(found) - layers) * each
    return total


def kv_heads(model: PreTrainedModel) -> tuple[int, int]:
    """(kv heads, head size)."""
    c = model.config
    heads = c.num_attention_heads
    dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    return getattr(c, "num_key_value_heads", None) or heads, dim


def entry_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token in all layers and kv heads: key and value in the model's dtype."""
    heads, dim = kv_heads(model)
    return 2 * model.config.num_hidden_layers * heads * dim * model.dtype.itemsize


def active_layers(cache: Any, model: PreTrainedModel) -> float:
    """Decoder layers that the next token runs, mean over rows."""
    layers = model.config.num_hidden_layers
    if not isinstance(cache, KVCache) or not cache.policy.schedules:
        return float(layers)
    runs = cache.policy.layers(layers, cache.engine.tokens[:, None], False)
    return float(layers) if runs is None else float(runs.float().sum(0).mean())


def step_bytes(model: PreTrainedModel, cache: Any, rows: int, kept: float) -> float:
    """Bytes that one step reads at least: weights once, and the keys and values of all ``rows``.

    ``kept``: entries per row, layer and kv head, for caches that are not ours (those are asked).
    """
    active = active_layers(cache, model)
    read = entries_read(cache) if isinstance(cache, KVCache) else kept
    share = active / model.config.num_hidden_layers
    return weight_bytes(model, active) + rows * read * share * entry_bytes(model)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds: pages in use of ours, tensors of transformers'."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    return sum(_nbytes(v) for layer in cache.layers for v in vars(layer).values())


def allocated_bytes(cache: Any) -> int:
    """Bytes that a cache has taken from the allocator: of ours also pages that are free."""
    if isinstance(cache, KVCache):
        return sum(s.reserved_bytes for s in cache.engine.storages.values())
    return cache_bytes(cache)


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in ``value``: one, several (hqq's tensor and scales), or one made of others (quanto)."""
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if type(value) not in (Tensor, torch.nn.Parameter) and inner is not None:
            return sum(_nbytes(getattr(value, name)) for name in inner()[0])
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(_nbytes, value))
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return 0


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated there."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 1 << 62
