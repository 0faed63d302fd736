"""The page pool: worked examples, errors, and a stateful comparison with a dictionary."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache import OutOfPages, PagePool


def table(rows, heads, width):
    return np.full((rows, heads, width), -1, np.int32)


def counts(values):
    return np.array(values, np.int32)


def pool_of(capacity, page_size=4, limit=-1):
    pool = PagePool(page_size, limit)
    pool.grow(capacity)
    return pool


def test_extend_takes_the_lowest_free_pages():
    pool, t = pool_of(8), table(2, 2, 3)
    held = counts([[0, 0], [0, 0]])
    assert pool.pages_needed(t, held, 5) == 8
    source, target = pool.extend(t, held, counts([1, 5]))
    assert source.dtype == target.dtype == np.int32
    assert len(source) == len(target) == 0
    assert t.tolist() == [[[0, -1, -1], [1, -1, -1]], [[2, 3, -1], [4, 5, -1]]]
    assert (pool.used, pool.free_pages, pool.capacity, pool.limit, pool.page_size) == (6, 2, 8, -1, 4)
    held[:] = [[1, 1], [5, 5]]
    assert pool.shrink(t, counts([[0, 1], [4, 5]])) == 2
    assert t.tolist() == [[[-1, -1, -1], [1, -1, -1]], [[2, -1, -1], [4, 5, -1]]]
    pool.extend(t, counts([[0, 1], [4, 5]]), counts([1, 4]))
    assert t.tolist() == [[[0, -1, -1], [1, -1, -1]], [[2, 3, -1], [4, 5, 6]]]
    assert pool.used_pages().tolist() == list(range(7))


def test_extend_within_the_last_page_is_free():
    pool, t = pool_of(2), table(1, 1, 2)
    pool.extend(t, counts([[0]]), 1)
    for n in (1, 2, 3):
        assert pool.pages_needed(t, counts([[n]]), 1) == 0
        pool.extend(t, counts([[n]]), 1)
    assert pool.pages_needed(t, counts([[4]]), 1) == 1
    assert pool.pages_needed(t, counts([[4]]), 0) == 0


def test_extend_may_be_repeated():
    """A reservation of the upper bound leaves later calls nothing to do."""
    pool, t = pool_of(4), table(1, 1, 4)
    pool.extend(t, counts([[0]]), 9)
    before = t.copy()
    assert pool.pages_needed(t, counts([[2]]), 7) == 0
    pool.extend(t, counts([[2]]), 7)
    assert (t == before).all()


def test_extend_of_a_shared_partial_page_copies_it_once():
    pool, a = pool_of(8), table(1, 1, 2)
    pool.extend(a, counts([[0]]), 6)
    pool.retain(a)
    both = np.concatenate([a, a])
    assert pool.shared(both)
    held = counts([[6], [6]])
    # The first row takes a copy; the second is then the only owner of the original.
    assert pool.pages_needed(both, held, 1) == 1
    source, target = pool.extend(both, held, 1)
    assert (source.tolist(), target.tolist()) == ([1], [2])
    assert both.tolist() == [[[0, 2]], [[0, 1]]]
    assert [pool.refcount(p) for p in range(3)] == [2, 1, 1]
    # Page 0 is full: both may go on sharing it.
    source, _ = pool.extend(both, counts([[7], [7]]), 1)
    assert len(source) == 0
    assert pool.shared(both)


def test_extend_of_a_shared_full_page_copies_nothing():
    pool, t = pool_of(8), table(1, 1, 2)
    pool.extend(t, counts([[0]]), 4)
    pool.retain(t)
    assert pool.pages_needed(t, counts([[4]]), 1) == 1
    source, _ = pool.extend(t, counts([[4]]), 1)
    assert len(source) == 0
    assert t.tolist() == [[[0, 1]]]


def test_unshare_replaces_shared_pages_of_the_range_only():
    pool, t = pool_of(12), table(1, 2, 3)
    pool.extend(t, counts([[0, 0]]), 9)
    pool.retain(t)
    mine = t.copy()
    source, target = pool.unshare(mine, counts([[1, 0]]), counts([[3, 1]]))
    assert source.tolist() == [1, 2, 3]
    assert target.tolist() == [6, 7, 8]
    assert mine.tolist() == [[[0, 6, 7], [8, 4, 5]]]
    assert not pool.shared(mine[:, :1, 1:].copy())


def test_unshare_is_all_or_nothing():
    pool, t = pool_of(3), table(1, 1, 2)
    pool.extend(t, counts([[0]]), 8)
    pool.retain(t)
    before = t.copy()
    with pytest.raises(OutOfPages) as error:
        pool.unshare(t, counts([[0]]), counts([[2]]))
    assert (error.value.needed, error.value.available) == (2, 1)
    assert (t == before).all()
    assert pool.refcount(0) == 2


def test_out_of_pages_changes_nothing_and_says_how_many():
    pool, t = pool_of(3), table(2, 1, 2)
    pool.extend(t, counts([[0], [0]]), counts([3, 0]))
    before = t.copy()
    with pytest.raises(OutOfPages, match="3 needed, 2 available") as error:
        pool.extend(t, counts([[3], [0]]), 5)
    assert isinstance(error.value, RuntimeError)
    assert (error.value.needed, error.value.available) == (3, 2)
    assert (t == before).all()
    assert pool.used == 1
    pool.grow(4)
    pool.extend(t, counts([[3], [0]]), 5)
    assert pool.used == 4


def test_limit():
    pool = pool_of(4, limit=5)
    pool.grow(5)
    with pytest.raises(OutOfPages) as error:
        pool.grow(6)
    assert (error.value.needed, error.value.available, pool.capacity) == (6, 5, 5)


def test_release_and_double_free():
    pool, t = pool_of(4), table(1, 1, 2)
    pool.extend(t, counts([[0]]), 8)
    pool.retain(t)
    twin, ghost = t.copy(), t.copy()
    assert pool.release(t) == 0
    assert (t == -1).all()
    assert pool.release(twin) == 2
    assert pool.used == 0
    for method in (pool.release, pool.retain, pool.shared):
        with pytest.raises(ValueError, match="page 0 of head \\(0, 0\\), which is not in use"):
            method(ghost)
    with pytest.raises(ValueError, match="not in use"):
        pool.extend(ghost, counts([[3]]), 1)
    assert (ghost >= 0).all()


def test_release_of_a_page_named_too_often_changes_nothing():
    pool, t = pool_of(4), table(1, 1, 2)
    pool.extend(t, counts([[0]]), 4)
    t[0, 0, 1] = t[0, 0, 0]
    with pytest.raises(ValueError, match="double free"):
        pool.release(t)
    assert pool.refcount(0) == 1
    assert (t == 0).all()


def test_relocate_keeps_low_ids_and_moves_the_others_down():
    pool, t = pool_of(300), table(1, 3, 100)
    pool.extend(t, counts([[0, 0, 0]]), 400)
    pool.release(t[:, :1].copy())
    t[:, 0] = -1
    pool.shrink(t, counts([[0, 40, 400]]))
    pool.retain(t[:, 2:].copy())
    before = {page: pool.refcount(page) for page in pool.used_pages().tolist()}
    remap = pool.relocate(110)
    assert remap.shape == (300,)
    assert pool.capacity == 110
    assert pool.used == len(before) == 110
    assert sorted(remap[list(before)].tolist()) == list(range(110))
    assert all(remap[page] == page for page in before if page < 110)
    assert all(pool.refcount(remap[page]) == n for page, n in before.items())
    assert (np.delete(remap, list(before)) == -1).all()
    with pytest.raises(ValueError, match="110 are in use"):
        pool.relocate(109)
    remap = pool.relocate(200)
    assert remap.tolist() == list(range(110))
    assert (pool.capacity, pool.free_pages) == (200, 90)


def test_bad_arguments():
    pool, t = pool_of(4), table(1, 1, 2)
    zero = counts([[0]])
    with pytest.raises(ValueError, match="page_size"):
        PagePool(0)
    with pytest.raises(ValueError, match="limit"):
        PagePool(4, -2)
    with pytest.raises(ValueError, match="grow to 3 pages would shrink"):
        pool.grow(3)
    with pytest.raises(ValueError, match="9 entries of head \\(0, 0\\) need a table of width 3, it has 2"):
        pool.extend(t, zero, 9)
    with pytest.raises(ValueError, match="negative"):
        pool.extend(t, zero, -1)
    with pytest.raises(ValueError, match="counts has shape \\[1\\], needs \\[1, 1\\]"):
        pool.extend(t, counts([0]), 1)
    with pytest.raises(ValueError, match="added has shape \\[2\\], needs \\[1\\]"):
        pool.extend(t, zero, counts([1, 2]))
    with pytest.raises(ValueError, match="does not exist"):
        pool.refcount(4)
    with pytest.raises(ValueError, match="page columns 0 to 3"):
        pool.unshare(t, zero, counts([[3]]))
    for bad in (t.astype(np.int64), np.full((1, 1, 4), -1, np.int32)[..., ::2], t.tolist()):
        with pytest.raises(TypeError):
            pool.extend(bad, zero, 1)
    with pytest.raises(TypeError, match="added must be"):
        pool.extend(t, zero, 1.0)
    frozen = t.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        pool.extend(frozen, zero, 1)
    assert pool.used == 0


def test_many_pages():
    """Beyond one word of the free list's summary."""
    pool, t = pool_of(10_000, page_size=1), table(1, 1, 10_000)
    pool.extend(t, counts([[0]]), 10_000)
    assert t[0, 0].tolist() == list(range(10_000))
    pool.shrink(t, counts([[9_000]]))
    pool.shrink(t, counts([[5_000]]))
    pool.extend(t, counts([[5_000]]), 5_000)
    assert t[0, 0].tolist() == list(range(10_000))
    pool.grow(20_000)
    assert pool.free_pages == 10_000


class PoolAgainstModel(RuleBasedStateMachine):
    """Several caches on one pool, forked, cut, extended and dropped; the model is a list of tables and a Counter."""

    @initialize(page_size=st.integers(1, 5), capacity=st.integers(0, 60))
    def start(self, page_size, capacity):
        self.size = page_size
        self.pool = PagePool(page_size)
        self.pool.grow(capacity)
        self.caches = []  # [table, counts]

    def references(self):
        return Counter(int(p) for t, _ in self.caches for p in t.ravel() if p >= 0)

    def lowest_free(self, n):
        used = self.references()
        return [p for p in range(self.pool.capacity) if p not in used][:n]

    @rule(rows=st.integers(1, 2), heads=st.integers(1, 3))
    def new(self, rows, heads):
        self.caches.append([table(rows, heads, 12 // self.size + 2), np.zeros((rows, heads), np.int32)])

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), added=st.lists(st.integers(0, 6), min_size=2, max_size=2), scalar=st.booleans())
    def extend(self, data, added, scalar):
        t, n = self.caches[data.draw(st.integers(0, len(self.caches) - 1))]
        more = np.full(t.shape[0], added[0]) if scalar else np.array(added[: t.shape[0]])
        if math.ceil((n + more[:, None]).max() / self.size) > t.shape[2]:
            return
        argument = int(added[0]) if scalar else more.astype(np.int32)
        before, references = t.copy(), self.references()
        needed, copies, expected = 0, [], t.copy()
        for r, h in np.ndindex(n.shape):
            if more[r] == 0:
                continue
            for c in range(n[r, h] // self.size, math.ceil((n[r, h] + more[r]) / self.size)):
                page = int(expected[r, h, c])
                if page >= 0 and references[page] == 1:
                    continue
                needed += 1
                if page >= 0:
                    references[page] -= 1
                    if c == n[r, h] // self.size and n[r, h] % self.size:
                        copies.append(page)
                expected[r, h, c] = -2
        assert self.pool.pages_needed(t, n, argument) == needed
        if needed > self.pool.free_pages:
            with pytest.raises(OutOfPages):
                self.pool.extend(t, n, argument)
            assert (t == before).all()
            return
        expected[expected == -2] = self.lowest_free(needed)
        source, target = self.pool.extend(t, n, argument)
        assert (t == expected).all()
        assert source.tolist() == copies
        assert set(target.tolist()) <= set(t.ravel().tolist()) - set(before.ravel().tolist())
        n += more[:, None].astype(np.int32)

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def shrink(self, data):
        t, n = self.caches[data.draw(st.integers(0, len(self.caches) - 1))]
        n[:] = np.array([data.draw(st.integers(0, int(c))) for c in n.ravel()]).reshape(n.shape)
        free = self.pool.free_pages
        freed = self.pool.shrink(t, n)
        assert self.pool.free_pages == free + freed
        assert ((t >= 0).sum(-1) == -(-n // self.size)).all()

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def fork(self, data):
        t, n = self.caches[data.draw(st.integers(0, len(self.caches) - 1))]
        self.pool.retain(t)
        self.caches.append([t.copy(), n.copy()])

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def drop(self, data):
        t, _ = self.caches.pop(data.draw(st.integers(0, len(self.caches) - 1)))
        free = self.pool.free_pages
        freed = self.pool.release(t)
        assert (t == -1).all()
        assert self.pool.free_pages == free + freed

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def unshare(self, data):
        t, _ = self.caches[data.draw(st.integers(0, len(self.caches) - 1))]
        begin = np.array([data.draw(st.integers(0, t.shape[2])) for _ in range(t[..., 0].size)], np.int32)
        begin = begin.reshape(t.shape[:2])
        end = np.full_like(begin, t.shape[2])
        shared = self.pool.shared(t)
        before = t.copy()
        try:
            source, target = self.pool.unshare(t, begin, end)
        except OutOfPages as error:
            assert error.needed > error.available == self.pool.free_pages
            assert (t == before).all()
            return
        changed = t != before
        assert source.tolist() == before[changed].tolist()
        assert target.tolist() == t[changed].tolist()
        assert shared or not changed.any()
        for r, h in np.ndindex(begin.shape):
            assert not self.pool.shared(t[r : r + 1, h : h + 1, begin[r, h] :].copy())
            assert not changed[r, h, : begin[r, h]].any()

    @rule(more=st.integers(0, 40))
    def grow(self, more):
        self.pool.grow(self.pool.capacity + more)

    @rule(spare=st.integers(0, 5))
    def relocate(self, spare):
        used = self.pool.used_pages()
        remap = self.pool.relocate(self.pool.used + spare)
        assert len(set(remap[used].tolist())) == len(used)
        for t, _ in self.caches:
            t[t >= 0] = remap[t[t >= 0]]

    @invariant()
    def agrees(self):
        references = self.references()
        assert self.pool.used == len(references)
        assert self.pool.shared_pages == sum(n > 1 for n in references.values())
        assert self.pool.used_pages().tolist() == sorted(references)
        assert all(self.pool.refcount(page) == n for page, n in references.items())


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
