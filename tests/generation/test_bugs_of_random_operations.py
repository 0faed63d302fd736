"""What test_random_operations found, each as the shortest run that shows it."""

from unittest import mock

import pytest
import torch
from support.engines import engine, held, scores, step
from support.models import build, continued, prompt

import kvcache
from kvcache import H2O, Full, OutOfPages, StreamingLLM, ops


def qkv(tokens, rows=1, seed=0):
    return torch.randn(3, rows, 1, tokens, 8, generator=torch.Generator().manual_seed(seed))


def used(e):
    (storage,) = e.storages.values()
    return storage.pool.used


def test_taking_back_what_came_last_copies_no_shared_page():
    e = engine(Full(), max_tokens=12)
    step(e, *qkv(9))
    twin = e.fork()
    assert used(e) == 3  # all that 12 tokens allow in pages of 4
    twin.crop(2)
    assert held(twin) == list(range(7))
    assert held(e) == list(range(9))
    assert used(e) == 3


def test_an_append_that_fails_after_it_got_its_pages_gives_them_back():
    e = engine(Full())
    step(e, *qkv(4))
    with mock.patch.object(ops, "append", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        step(e, *qkv(9))
    e.abort()
    assert used(e) == 1
    step(e, *qkv(5))
    assert held(e) == list(range(9))
    assert used(e) == 3


def test_a_first_forward_that_fails_forgets_neither_recording_nor_the_length_of_the_prompt():
    e = engine(H2O(2, 1), prefill="chunked")
    e.recording, e.prompt_length = True, 20
    with mock.patch.object(ops, "append", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        step(e, *qkv(9))
    e.abort()
    assert e.recording
    assert e.prompt_length == 20


def test_scores_that_wait_follow_their_rows():
    found = []
    for reordered in (False, True):
        e = engine(H2O(50, 50))
        step(e, *qkv(6, rows=2))
        e.recording = True
        step(e, *qkv(2, rows=2, seed=1))
        if reordered:
            e.select_rows(torch.tensor([1, 1, 0]))
            e.crop(1)
        else:
            e.crop(1)
            e.select_rows(torch.tensor([1, 1, 0]))
        n = e.layers[0].store.max_count
        found.append(e.layers[0].store.columns[0][..., :n])
    assert torch.allclose(*found, atol=1e-6)
    assert scores(e)[0] > 0


def test_a_forward_whose_eviction_would_run_out_of_pages_does_not_begin():
    """Evicting from a page that a fork shares copies it; that is known before."""
    e = engine(StreamingLLM(2, 6), max_tokens=16)
    step(e, *qkv(8))
    twins = [e.fork() for _ in range(2)]
    assert used(e) == 2
    step(twins[0], *qkv(1, seed=1))  # two pages more for a moment, then one: what it evicted from
    before = held(e)
    with pytest.raises(OutOfPages):
        step(twins[1], *qkv(1, seed=1))
    assert twins[1].step is None
    assert twins[1].seen == 8
    assert held(twins[1]) == held(e) == before
    del twins[0]
    step(twins[-1], *qkv(1, seed=1))
    assert len(held(twins[-1])) == 8


def test_a_crop_that_would_run_out_of_pages_changes_nothing():
    e = engine(StreamingLLM(0, 4), max_tokens=12)
    for n in range(6):  # one at a time: newcomers take the places of those that left
        step(e, *qkv(1, seed=n))
    twin = e.fork()
    twin.recording = True  # evicts nothing
    step(twin, *qkv(5, seed=9))
    assert used(e) == 3
    with pytest.raises(OutOfPages):
        e.crop(2)
    assert (held(e), e.seen, e.tokens.tolist()) == ([2, 3, 4, 5], 6, [6])
    del twin
    e.crop(2)
    assert (held(e), e.seen) == ([2, 3], 4)


def test_a_cache_that_was_cropped_to_nothing_is_carried_over():
    e = engine(StreamingLLM(1, 3))
    step(e, *qkv(5))
    e.crop(5)
    again = engine(StreamingLLM(1, 3))
    again.import_state(e.export_state(), torch.device("cpu"))
    step(again, *qkv(3))
    assert held(again) == [0, 1, 2]


@torch.no_grad()
def test_compact_positions_with_more_padding_than_a_chunk_of_queries():
    """Every row begins with padding that fills whole chunks: there is nothing to list for them."""
    ids = torch.nn.functional.pad(prompt(9), (8, 0))
    mask = (torch.arange(17) >= 8).long()[None]
    model = kvcache.wrap(build(), "tokenselect(k=20, sinks=1, local=3, positions='compact')")
    found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 8:]
    assert (found - model(ids[:, 8:]).logits).abs().max() < 5e-5


def test_a_chunk_of_nothing_but_padding():
    model = build()
    ids = torch.nn.functional.pad(prompt(9), (8, 0))
    mask = (torch.arange(17) >= 8).long()[None]
    expected = continued(model, ids, mask, 8)
    kvcache.wrap(model, "full")
    assert torch.equal(continued(model, ids, mask, 8, prefill_chunk_size=4), expected)
