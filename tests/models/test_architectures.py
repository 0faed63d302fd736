"""Every architecture generates through ``policy="full"`` what it generates without kvcache, and is left as it was."""

import pytest
import torch
from support.models import ARCHITECTURES, WINDOW, build, continued, greedy, padded, prompt

import kvcache

LENGTHS = (40, 27, 35)
ROWS = [prompt(n, seed=i)[0] for i, n in enumerate(LENGTHS)]


def inputs(side):
    if side == "single":
        return prompt(40), None
    return padded(ROWS, side)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_generates_the_same_tokens(name, backend):
    model = build(name)
    sides = ("single", "left", "right")
    expected = {side: continued(model, *inputs(side)) for side in sides}
    # A model that repeats one token would hide errors.
    assert len(expected["single"].unique()) >= 8
    kvcache.wrap(model, "full")
    for side in sides:
        out = greedy(model, *inputs(side))
        cache = out.past_key_values
        assert type(cache) is kvcache.KVCache
        assert torch.equal(out.sequences[:, 40:], expected[side]), side
        # Padding is never stored, and a sliding window holds no more than can still be read.
        lengths = torch.tensor([40] if side == "single" else LENGTHS)
        for i, window in enumerate(model._kvcache_state.windows):
            held = lengths + 23 if window is None else (lengths + 23).clamp(max=WINDOW - 1)
            if side == "right" and window is not None:  # windows count columns: padding in them takes room
                assert (cache.kept(i) <= WINDOW - 1).all()
                continue
            assert torch.equal(cache.kept(i), held[:, None].expand_as(cache.kept(i))), (side, i)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unwrap_leaves_no_trace(name):
    model = build(name)
    ids = prompt(30)
    names = [n for n, _ in model.named_modules()]

    def traces():
        return {
            n: (sorted(m.__dict__), list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()))
            for n, m in model.named_modules()
        }

    with torch.no_grad():
        logits = model(ids).logits
    before, config, implementation = traces(), model.config.to_dict(), model.config._attn_implementation
    kvcache.wrap(model, "skipdecode(min_layers=1, max_layers=3, horizon=64)")
    assert model.config._attn_implementation == "kvcache"
    greedy(model, ids, new=4)
    assert kvcache.unwrap(model) is model
    assert names == [n for n, _ in model.named_modules()]
    assert traces() == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert not isinstance(greedy(model, ids, new=2).past_key_values, kvcache.KVCache)
    kvcache.unwrap(model)  # nothing to undo: nothing happens


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unwrap_restores_the_attention_implementation_that_was_chosen(implementation):
    model = build("llama-gqa")
    model.set_attn_implementation(implementation)
    kvcache.wrap(model)
    kvcache.unwrap(model)
    assert model.config._attn_implementation == implementation
    assert all(m.config._attn_implementation == implementation for m in model.modules() if hasattr(m, "layer_idx"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, backend):
    # Tokens may differ where two are nearly equal; logits may not.
    model = build("qwen3").to(dtype)
    ids = prompt(40)
    with torch.no_grad():
        dense = model(ids).past_key_values
        expected = model(prompt(1, seed=5), past_key_values=dense).logits.float()
        kvcache.wrap(model)
        cache = model(ids).past_key_values
        logits = model(prompt(1, seed=5), past_key_values=cache).logits.float()
    assert cache.nbytes == 3 * 2 * 3 * 16 * 32 * 2  # layers, heads, pages of 16, K and V of 16, bytes
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(("kv_dtype", "size"), [("fp32", 4), ("bf16", 2), (torch.float16, 2), ("float16", 2)])
def test_kv_dtype_stores_in_another_precision(kv_dtype, size, backend):
    model = build("qwen3")
    ids = prompt(40)
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
        kvcache.wrap(model, kv_dtype=kv_dtype)
        cache = model(ids).past_key_values
        logits = model(ids[:, :1], past_key_values=cache).logits[:, -1]
    assert cache.nbytes == 3 * 2 * 3 * 16 * 32 * size
    assert cache.full_nbytes == 3 * 2 * 41 * 32 * 4
    assert (logits - expected).abs().max() < {4: 1e-4, 2: 0.3}[size]
