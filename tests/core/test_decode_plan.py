"""How decode attention on a GPU shares its work among blocks: plans, and the shape of a block (core/decode_plan.h)."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import use

from kvcache import ops
from kvcache._C import decode_block

UNIT, LEAST = 64, 128
HEAD, SHARE = 8, 8


@dataclass
class Piece:
    """What one worker has of an item, as the kernels take it from the worker's share."""

    worker: int
    item: int
    begin: int  # units of the item
    end: int
    first: int  # the workers that share the item
    last: int

    @property
    def partial(self) -> int:
        return 2 * self.worker + (self.worker == self.first)


def plan_of(counts, added=0, most=None, workers=24):
    most = max(counts, default=0) + added if most is None else most
    line = ops.plan_decode(torch.tensor(counts, dtype=torch.int32).view(1, 1, -1), added, most, workers)[0].tolist()
    assert len(line) == HEAD + SHARE * workers
    return line


def pieces_of(line):
    out = []
    for worker, at in enumerate(range(HEAD, len(line), SHARE)):
        first, first_unit, last, last_end, first_from, first_to, last_to, _ = line[at : at + SHARE]
        for item in range(first, last + 1):
            begins, ends = item != first or worker == first_from, item != last or worker == last_to
            end = last_end if item == last else None
            begin = first_unit if item == first else 0
            since = first_from if item == first else worker
            until = first_to if item == first else last_to if item == last else worker
            assert begins == (since == worker)
            assert ends == (until == worker)
            assert begins == (begin == 0)
            out.append(Piece(worker, item, begin, end, since, until))
    return out


def check(counts, added, workers, line):
    """Every unit once, shares within one unit of each other, partial results apart."""
    assert line[0] == len(counts)
    unit, busy = line[1], line[2]
    units = [max(1, -(-(n + added) // unit)) for n in counts]
    total = sum(units)
    pieces = pieces_of(line)
    by_item = {i: [] for i in range(len(counts))}
    load = [0] * workers
    for p in pieces:
        end = units[p.item] if p.end is None else p.end
        assert 0 <= p.begin < end <= units[p.item]
        by_item[p.item].append((p.begin, end, p))
        load[p.worker] += end - p.begin
    for item, parts in by_item.items():
        parts.sort(key=lambda x: x[0])
        assert [p.worker for *_, p in parts] == list(range(parts[0][2].first, parts[0][2].last + 1))
        assert {(p.first, p.last) for *_, p in parts} == {(parts[0][2].first, parts[0][2].last)}
        assert parts[0][0] == 0
        assert parts[-1][1] == units[item]
        assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(load[w] > 0 for w in range(busy))
    assert not any(load[busy:])
    assert max(load, default=0) - min(load[:busy], default=0) <= 1
    if busy > 1:
        assert min(load[:busy]) * unit >= LEAST
    if total * unit >= workers * max(LEAST, unit):
        assert busy == workers
    partials = [p.partial for p in pieces if p.first != p.last]
    assert len(set(partials)) == len(partials)
    assert all(0 <= i < 2 * workers for i in partials)


COUNTS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 130), st.integers(0, 5000)), min_size=1, max_size=300)


@given(counts=COUNTS, added=st.sampled_from((0, 1, 100)), workers=st.integers(1, 300))
def test_plans(counts, added, workers):
    check(counts, added, workers, plan_of(counts, added, workers=workers))


@pytest.mark.emulated
@given(counts=COUNTS, workers=st.integers(1, 40))
@settings(max_examples=25)
def test_planner_of_the_device(counts, workers):
    """The CUDA kernel's plan is the host's, bit for bit."""
    layers = torch.tensor([counts, counts[::-1], [0] * len(counts)], dtype=torch.int32).view(3, 1, -1)
    host = ops.plan_decode(layers, 1, 5001, workers)
    with use("emulated"):
        assert torch.equal(ops.plan_decode(layers, 1, 5001, workers), host)


@pytest.mark.emulated
@pytest.mark.parametrize("items", [1, 31, 32, 33, 1023, 1024, 1025, 200_000])
def test_planner_of_the_device_with_many_items(items):
    counts = torch.randint(0, 2000, (1, items, 1), dtype=torch.int32, generator=torch.Generator().manual_seed(items))
    counts[counts % 3 == 0] = 0
    host = ops.plan_decode(counts, 0, 2000, 264)
    with use("emulated"):
        assert torch.equal(ops.plan_decode(counts, 0, 2000, 264), host)


def test_examples():
    # 8 heads of 32,768 entries on 264 blocks: 4,096 units, 15 or 16 each
    line = plan_of([32768] * 8, workers=264)
    check([32768] * 8, 0, 264, line)
    assert line[:3] == [8, 64, 264]
    # ... of 4,096 entries: 512 units; a share is at least 2
    assert plan_of([4096] * 8, workers=264)[2] == 256
    # short contexts are not cut to pieces
    assert all(p.first == p.last for p in pieces_of(plan_of([100] * 8, workers=264)))
    # no entries at all: somebody writes the zeros
    line = plan_of([0] * 50, workers=8)
    check([0] * 50, 0, 8, line)
    assert {p.item for p in pieces_of(line)} == set(range(50))


def test_no_items():
    assert (
        ops.plan_decode(torch.zeros(2, 0, 4, dtype=torch.int32), 0, 10, 3).tolist()
        == [[0, 64, 0, 0, 0, 0, 0, 0] + [0, 0, -1, 0, 0, 0, 0, 0] * 3] * 2
    )


def test_more_than_most_is_planned_as_most():
    """`most` fixes what a plan may hold; larger counts make it uneven, not wrong."""
    assert plan_of([10_000, 10], most=640, workers=4) == plan_of([640, 10], most=640, workers=4)


def test_units_grow_where_int32_would_not_do():
    counts = torch.tensor([2**31 - 1] * 64, dtype=torch.int32).view(1, 8, 8)
    line = ops.plan_decode(counts, 0, 2**31 - 1, 7)[0].tolist()
    assert line[1] > UNIT
    check(counts.flatten().tolist(), 0, 7, line)


@pytest.mark.parametrize(
    ("what", "part_bytes", "limit", "fixed", "expected"),
    [
        # bytes of 16 keys and values with 16 bytes of padding each; limits of H200, A100 and RTX 4090 or 5090
        ("H200, 128 x bf16", 16 * 2 * 272, 227 * 1024, 9 * 1024, (4, 3, 2)),
        ("H200, 256 x bf16", 16 * 2 * 528, 227 * 1024, 5 * 1024, (2, 3, 2)),
        ("H200, 64 x bf16", 16 * 2 * 144, 227 * 1024, 9 * 1024, (4, 5, 2)),
        ("A100, 128 x bf16", 16 * 2 * 272, 163 * 1024, 9 * 1024, (4, 2, 2)),
        ("RTX, 256 x float32", 16 * 2 * 1040, 99 * 1024, 4 * 1024, (1, 2, 1)),
    ],
)
def test_block(what, part_bytes, limit, fixed, expected):
    assert decode_block(part_bytes, limit, 2, fixed) == expected


@given(st.integers(64, 70_000), st.sampled_from((48, 99, 163, 227)), st.integers(1, 2), st.integers(0, 32 * 1024))
def test_blocks_fit(part_bytes, limit, most_blocks, fixed):
    parts, stages, blocks = decode_block(part_bytes, limit * 1024, most_blocks, fixed)
    if parts == 0:  # not even two stages for one warp
        assert 2 * part_bytes + fixed > limit * 1024
        return
    assert parts in (1, 2, 4)
    assert 2 <= stages <= 6
    assert 1 <= blocks <= most_blocks
    assert blocks * (stages * parts * part_bytes + fixed + 1024) <= (limit + 1) * 1024
