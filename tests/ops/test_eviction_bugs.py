"""Bug 15 of the table in docs/emulation.md: results turn to garbage once eviction fires.

A prompt of needles, which queries look for, among filler, which weighs nothing. Only filler is evicted, by every means
there is, so that attention over what is left must be attention over everything there ever was: in plain torch, which
knows absolute positions and nothing of slots, pages or eviction. Whole models: tests/oracles/test_universal.py.
"""

import pytest
import torch
from paged_case import make_paged

from kvcache import ops

ROWS, HEADS, GROUP, DIM, EVERY = 2, 2, 3, 64, 7  # every seventh token is a needle
SCALE = DIM**-0.5


class _Text:
    """Everything ever appended, densely, by position; and the storage that filler is evicted from."""

    def __init__(self, dtype, page_size):
        self.g = torch.Generator().manual_seed(page_size)
        self.case = make_paged(
            rows=ROWS, heads=HEADS, page_size=page_size, k_dim=DIM, v_dim=DIM, dtype=dtype, max_count=0, room=300
        )
        self.error = 1e-4 if dtype == torch.float32 else 0.03
        self.k = self.v = torch.empty(ROWS, HEADS, 0, DIM)

    def append(self, n):
        dtype = self.case.k_pages.dtype
        k, v = (torch.randn(ROWS, HEADS, n, DIM, generator=self.g).to(dtype) for _ in range(2))
        places = torch.arange(self.k.shape[2], self.k.shape[2] + n, dtype=torch.int32)
        k[..., 0] = torch.where(places % EVERY == 0, 0.0, -100.0)  # times 8 · SCALE: filler weighs e^-100
        ops.append(*self.case.args, k, v, places.repeat(ROWS, 1))
        self.k, self.v = torch.cat([self.k, k.float()], 2), torch.cat([self.v, v.float()], 2)

    def filler(self, r, h):
        """Slots that hold filler, in random order."""
        held = self.case.positions[r, h, : int(self.case.counts[r, h])]
        slots = (held % EVERY != 0).nonzero().squeeze(-1)
        return slots[torch.randperm(len(slots), generator=self.g)]

    def overwrite(self):
        victims = torch.tensor([[int(self.filler(r, h)[0]) for h in range(HEADS)] for r in range(ROWS)])
        ops.overwrite(*self.case.args, victims.int())

    def compact(self, share):
        case = self.case
        keep = torch.full((ROWS, HEADS, int(case.counts.max())), -1, dtype=torch.int32)
        keep_counts = torch.zeros_like(case.counts)
        for r in range(ROWS):
            for h in range(HEADS):
                slots, n = self.filler(r, h), int(case.counts[r, h])
                left = torch.ones(n, dtype=torch.bool)
                left[slots[: int(len(slots) * share * (1 + h) / HEADS)]] = False  # heads keep different numbers
                keep_counts[r, h] = int(left.sum())
                keep[r, h, : int(left.sum())] = left.nonzero().squeeze(-1).int()
        ops.compact(*case.args[:3], case.table, *case.args[3:], keep, keep_counts)

    def check(self):
        case, total = self.case, self.k.shape[2]
        for r in range(ROWS):
            for h in range(HEADS):
                held = case.positions[r, h, : int(case.counts[r, h])].tolist()
                assert len(set(held)) == len(held)
                assert set(range(0, total, EVERY)) <= set(held) <= set(range(total))
        q = torch.randn(ROWS, HEADS * GROUP, 4, DIM, generator=self.g).to(case.k_pages.dtype)
        q[..., 0] = 8.0
        # Between needles, at one, and at the end: each sees a needle, also those 20 positions back.
        place = torch.tensor([total // 3, total // 2 // EVERY * EVERY, total - 2, total - 1], dtype=torch.int32)
        hidden = dict.fromkeys(("sinks", "bias", "mask", "index", "index_counts"))
        for window in (None, 20):
            start = None if window is None else (place - window).repeat(ROWS, 1)
            got, _ = ops.prefill_attention(
                q, *case.args[:5], place.repeat(ROWS, 1), window_start=start, scale=SCALE, **hidden
            )
            want = self.dense(q, place, window)
            torch.testing.assert_close(got.transpose(1, 2).float(), want, rtol=0, atol=self.error)
            lost = self.dense(q, place - EVERY, window)  # what a shift of positions by one needle would give
            assert (lost - want).abs().amax((0, 1, 3)).min() > 0.1
        hidden.pop("mask")
        got, _ = ops.decode_attention(q[:, :, 3].contiguous(), *case.args[:5], window_start=None, statistics=None,
                                      scale=SCALE, **hidden)  # fmt: skip
        torch.testing.assert_close(got.float(), self.dense(q, place, None)[:, :, 3], rtol=0, atol=self.error)

    def dense(self, q, place, window):
        k, v = (x.repeat_interleave(GROUP, 1) for x in (self.k, self.v))
        everything = torch.arange(k.shape[2])
        seen = everything <= place[:, None]
        if window is not None:
            seen &= everything >= place[:, None] - window
        logits = (q.float() @ k.transpose(-1, -2) * SCALE).masked_fill(~seen, float("-inf"))
        return logits.softmax(-1) @ v


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bug_15_needles_stay_where_they_were(backend, dtype, page_size):
    text = _Text(dtype, page_size)
    text.append(120)
    text.check()
    for _ in range(30):  # decode steps of a policy with a budget
        text.append(1)
        text.overwrite()
    assert (text.case.counts == 120).all()
    text.check()
    text.compact(0.5)
    text.check()
    text.append(40)  # at the absolute positions that follow, not behind the entries that are left
    assert (text.case.positions[0, 0, int(text.case.counts[0, 0]) - 1]) == 189
    for _ in range(10):
        text.overwrite()
    text.compact(1.0)
    assert (text.case.counts[:, 1] == 190 // EVERY + 1).all()  # nothing but needles
    text.check()
