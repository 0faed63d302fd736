"""Rows that begin alike (beams, several samples of one prompt) share the pages of their prompt from the start."""

import pytest
import torch
from support.models import build, greedy, padded, prompt
from support.policies import POLICIES
from transformers import DynamicCache

import kvcache
from kvcache.layers import first_alike

NAMES = ["full", "streamingllm", "h2o", "random", "tokenselect", "skipdecode", "h2o|skipdecode"]
NAMES += ["keydiff-slack", "lagkv", "duoattention", "expectedattention", "tova", "snapkv", "adakv-evict"]
NAMES += ["promptdistill", "promptdistill-truncate", "gemfilter", "trimkv", "trimkv-global", "quest", "rkv"]


def prefilled(model, ids, mask=None):
    with torch.no_grad():
        if mask is None:
            return model(ids).past_key_values
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values


@pytest.mark.parametrize("name", NAMES)
def test_beams_hold_the_bytes_of_one_after_prefill(name):
    model = kvcache.wrap(build(num_hidden_layers=5), POLICIES[name], page_size=4)
    one = prefilled(model, prompt(60))
    four = prefilled(model, prompt(60).repeat_interleave(4, 0))
    assert four.nbytes == one.nbytes
    assert [s.pool.used for s in four.engine.storages.values()] == [s.pool.used for s in one.engine.storages.values()]
    # Never more than that, also while the prompt was read: the pool was not made for four.
    assert four.report().reserved_nbytes <= 1.2 * one.report().reserved_nbytes
    assert four.kept(0).shape[0] == 4
    for row in range(4):
        for layer in range(5):
            assert torch.equal(four.positions(layer, row, 1), one.positions(layer, 0, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_shared_rows_continue_like_rows_of_their_own(name, side):
    """Equal rows among others, padded; then every row goes its own way."""
    rows = [prompt(n, seed=20 + n)[0] for n in (30, 19, 30, 25, 19)]
    ids, mask = padded(rows, side)
    model = kvcache.wrap(build(num_hidden_layers=5), POLICIES[name], page_size=4)
    cache = prefilled(model, ids, mask)
    alone = [prefilled(model, row[None]) for row in rows]
    if name == "full":
        assert cache.nbytes == sum(alone[r].nbytes for r in (0, 1, 3))
    places = mask.sum(1)[:, None]
    with torch.no_grad():
        for s in range(6):
            step = prompt(1, seed=50 + s, rows=5)
            found = model(step, past_key_values=cache, position_ids=places + s).logits
            expected = torch.cat([model(step[r][None], past_key_values=alone[r]).logits for r in range(5)])
            assert (found - expected).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3", "gpt-oss", "gemma2"])
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
def test_generates_what_the_unwrapped_model_generates(name, options):
    model = build(name)
    ids, mask = padded([prompt(n, seed=n)[0] for n in (24, 17)], "left")

    def run():
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, **{"do_sample": False, **options})

    expected = run()
    kvcache.wrap(model, "full", page_size=4)
    assert torch.equal(run(), expected)


def test_rows_that_differ_in_anything_are_not_taken_for_one():
    model = build()
    ids = prompt(12).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    places = torch.stack([torch.arange(12), torch.arange(12) * 2])
    kvcache.wrap(model, "full", page_size=4)
    one = prefilled(model, ids[:1]).nbytes
    with torch.no_grad():
        for extra in ({"attention_mask": mask}, {"position_ids": places}):
            expected = model(ids, past_key_values=DynamicCache(config=model.config), **extra).logits
            out = model(ids, **extra)
            assert (out.logits[:, -1] - expected[:, -1]).abs().max() < 5e-5
            assert out.past_key_values.nbytes > 1.5 * one
        for per_row, same in ((torch.tensor([1.0, 2.0]), False), (torch.ones(2), True), (torch.arange(12), True)):
            first = first_alike({"input_ids": ids, "extra": per_row}, 2)
            assert (first.tolist() == [0, 0]) == same
        embeds = model.get_input_embeddings()(ids)
        assert model(inputs_embeds=embeds).past_key_values.nbytes == one


def test_a_prompt_that_fits_once_fits_for_every_beam():
    model = kvcache.wrap(build(), "h2o(heavy=4, recent=4)", page_size=4, max_tokens=80)
    assert greedy(model, prompt(40), num_beams=4, new=4).sequences.shape == (1, 44)
