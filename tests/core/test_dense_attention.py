"""flash-attn is used where it fits, with the same answer. The package is a pretended one, plain torch inside."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from kvcache import dense_attention as module


@pytest.fixture
def calls(monkeypatch):
    made = []

    def flash_attn_func(q, k, v, softmax_scale, causal):
        made.append(q.shape)
        group = q.shape[2] // k.shape[2]
        k, v = (x.float().repeat_interleave(group, 2) for x in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * softmax_scale
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).to(q.dtype)

    fake = ModuleType("flash_attn")
    fake.flash_attn_func, fake.__spec__ = flash_attn_func, ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    module._flash_attn.cache_clear()
    yield made
    module._flash_attn.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "dtype", "dim", "used"),
    [(1, torch.bfloat16, 64, 1), (1, torch.float16, 256, 1), (0, torch.bfloat16, 64, 0), (1, torch.float32, 64, 0),
     (1, torch.bfloat16, 264, 0)],
)  # fmt: skip
def test_used_where_it_fits(calls, monkeypatch, gpu, dtype, dim, used):
    monkeypatch.setattr(module, "_on_gpu", lambda q: bool(gpu))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, dim, generator=g).to(dtype) for h in (6, 2, 2))
    out = module.dense_attention(q, k, v, 0.2)
    assert len(calls) == used
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=0.2, enable_gqa=True
    )
    assert out.shape == q.shape
    assert (out.float() - want).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("tiles", "types"), [(True, (torch.bfloat16,)), (False, ())])
def test_torch_prefills_on_a_cpu_only_where_it_has_matrix_tiles(monkeypatch, tiles, types):
    module.fast_types.cache_clear()
    try:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
        assert module.fast_types("cpu") == types
        module.fast_types.cache_clear()
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
        assert module.fast_types("cpu") == types
    finally:
        module.fast_types.cache_clear()
    assert module.fast_types("cuda") == (torch.float16, torch.bfloat16)
