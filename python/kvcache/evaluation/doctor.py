"""``kvcache doctor``: what is installed, what runs, and whether it works here. Needs no extras."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from .. import _C, __version__, ops
from ..attention import CACHE
from ..policies.base import REGISTRY
from ..wrap import wrap
from .rows import processor

__all__ = ["CHECKS", "facts", "run"]

#: Names in ``kvcache.ops`` that are no ops.
#: Optional arguments of decode attention, all left out.
_NOTHING: dict[str, Any] = dict.fromkeys(
    ("window_start", "sinks", "bias", "index", "index_counts", "statistics"),
)


def facts() -> Iterator[tuple[str, str]]:
    """What there is to know about this installation, as (name, value)."""
    yield "kvcache", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "transformers", transformers.__version__
    yield "processor", f"{processor()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads in use"
    forced = os.environ.get("KVCACHE_BACKEND")
    yield "backend", ops.backend() + (f" (KVCACHE_BACKEND={forced})" if forced else "")
    forced = os.environ.get("KVCACHE_ISA")
    chosen = f" (KVCACHE_ISA={forced})" if forced else ""
    yield "instruction set", f"{_C.isa}{chosen}; this machine can run {', '.join(_C.available_isas)}"
    cuda = _C.cuda_info()
    built = f"built for {cuda['archs']}, runtime {cuda['runtime']}" if cuda["compiled"] else "not in this build"
    yield "CUDA", f"{built}; driver {cuda['driver'] or 'none'}" + (f"; {cuda['error']}" if cuda["error"] else "")
    for i, device in enumerate(cuda["devices"]):
        major, minor = device["capability"]
        yield (
            f"GPU {i}",
            f"{device['name']}, compute capability {major}.{minor}, {device['multiprocessors']} multiprocessors, "
            f"{device['memory'] / 2**30:.0f} GiB",
        )
    yield "policies", ", ".join(sorted(REGISTRY))


# -- checks: each returns a line for people or raises ----------------------------------------------------------------


def _registry(device: str) -> str:
    """Every op of ``kvcache.ops`` is registered with torch, with a kernel for the device."""
    key = device.upper()
    for name in ops.OPS:
        if not hasattr(torch.ops.kvcache, name):
            raise RuntimeError(f"torch does not know kvcache::{name}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kvcache::{name}", key):
            raise RuntimeError(f"kvcache::{name} has no {key} kernel")
    return f"{len(ops.OPS)} ops registered with torch, each with a {key} kernel"


def _case(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A small ragged cache: 2 rows, 2 kv heads, 24 and 17 entries in pages of 8, in shuffled order."""
    torch.manual_seed(0)
    counts = torch.tensor([[24, 17], [9, 24]], dtype=torch.int32)
    case = {
        "q": torch.randn(2, 4, 32).to(dtype),
        "k_pages": torch.randn(12, 8, 32).to(dtype),
        "v_pages": torch.randn(12, 8, 32).to(dtype),
        "table": torch.randperm(12).int().view(2, 2, 3),
        "counts": counts,
        "positions": torch.arange(24, dtype=torch.int32).expand(2, 2, -1).contiguous(),
    }
    return {name: x.to(device) for name, x in case.items()}


def _attention(device: str) -> str:
    """The native decode attention agrees with the reference in every storage dtype."""
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = _case(dtype, device)
        outs = []
        for backend in ("native", "reference"):
            with ops.use_backend(backend):
                out, _ = ops.decode_attention(**case, **_NOTHING, scale=32**-0.5)
                outs.append(out.float())
        error = float((outs[0] - outs[1]).abs().max())
        if not error < (1e-4 if dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"decode attention in {dtype} is off by {error:.2g}")
        worst = max(worst, error if dtype == torch.float32 else 0.0)
    return f"decode attention agrees with the reference (float32: within {worst:.1g})"


def _selection(device: str) -> str:
    """The native top-k and victim choice agree with the reference."""
    case = _case(torch.float32, device)
    scores = torch.rand(2, 2, 24).to(device)
    first, end = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 2], [20, 6]))
    wanted = case["counts"] // 2
    found = []
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            index, counts = ops.topk(scores, case["counts"], case["positions"], wanted, first, end, 24)
            live = torch.arange(24, device=device) < counts[..., None]
            victims = ops.choose_victims(scores, case["counts"], case["positions"], wanted, first, end)
            found.append((torch.where(live, index, -1), counts, victims))
    if not all(torch.equal(a, b) for a, b in zip(*found)):
        raise RuntimeError("top-k or victim choice differs from the reference")
    return "top-k and victim choice agree with the reference"


def _generation(device: str) -> str:
    """A wrapped model generates what it generates unwrapped; an eviction policy keeps its budget."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    prompt = torch.randint(1, 64, (2, 40)).to(device)
    asked: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False,
    }  # fmt: skip
    plain = model.generate(prompt, **asked)
    wrap(model, "full")
    if not torch.equal(model.generate(prompt, **asked), plain):
        raise RuntimeError("a wrapped tiny Llama with policy 'full' generates other tokens than unwrapped")
    wrap(model, "h2o(heavy=8, recent=8)")
    cache = model.generate(prompt, **asked, return_dict_in_generate=True)[CACHE]
    if not bool((cache.kept(0) == 16).all()):
        raise RuntimeError(f"h2o(heavy=8, recent=8) keeps {cache.kept(0).tolist()} entries instead of 16")
    return "a wrapped tiny Llama generates the same tokens; H2O keeps its budget"


CHECKS: tuple[Callable[[str], str], ...] = (_registry, _attention, _selection, _generation)


def run() -> int:
    """Print facts and checks; 0 when all checks pass, else 1."""
    known = list(facts())
    width = max(len(name) for name, _ in known)
    for name, value in known:
        print(f"{name:<{width}}  {value}")
    print()
    devices = ["cpu"]
    if torch.cuda.is_available() and _C.cuda_info()["compiled"]:
        devices.append("cuda")
    failed = 0
    for device in devices:
        for check in CHECKS:
            try:
                print(f"ok      {device}: {check(device)}", flush=True)
            except Exception as error:  # whatever goes wrong here is what the user wants to read
                failed += 1
                print(f"FAILED  {device}: {error}")
    print("\nEverything works." if not failed else f"\n{failed} of {len(devices) * len(CHECKS)} checks failed.")
    return 1 if failed else 0
