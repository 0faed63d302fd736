"""Pool and stores against plain dictionaries: any sequence of changes, content compared after each, no page lost."""

from collections import Counter

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcache import OutOfPages
from kvcache.store import LayerStore, PageStorage

K_DIM, V_DIM, HEADS = 4, 6, 2


class Pair:
    """A store and its model: ``rows[r][h]`` maps position to (key, value, columns)."""

    def __init__(self, store, rows, next_positions):
        self.store, self.rows, self.next = store, rows, next_positions


class StoreMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 2, 3, 8]), limit=st.none() | st.integers(4, 40), bf16=st.booleans())
    def begin(self, page_size, limit, bf16):
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.storage = PageStorage(page_size, K_DIM, V_DIM, dtype, torch.device("cpu"))
        self.storage.limit = limit
        self.pairs: list[Pair] = []
        self.stamp = 0

    def fresh(self, *shape):
        """Values that occur once and are exact in bfloat16: small integers, told apart by their pattern."""
        n = int(np.prod(shape))
        out = torch.empty(n)
        for i in range(n):
            self.stamp = self.stamp * 1103515245 + 12345 & 0x7FFFFFFF
            out[i] = (self.stamp >> 8) % 255 - 127
        return out.view(shape)

    def attempt(self, change):
        """Whether ``change`` worked; when it ran out of pages nothing may have changed, which the invariant checks."""
        try:
            change()
        except OutOfPages:
            assert self.storage.limit is not None
            return False
        return True

    def pick(self, data):
        # By number: hypothesis holds on to what it drew, and a store that is held cannot be dropped.
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(rows=st.integers(1, 3))
    def open(self, rows):
        store = LayerStore(self.storage, rows, HEADS, ("extra",))
        self.pairs.append(Pair(store, [[{} for _ in range(HEADS)] for _ in range(rows)], [0] * rows))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), tokens=st.integers(1, 9), with_columns=st.booleans(), spare=st.integers(0, 3))
    def append(self, data, tokens, with_columns, spare):
        pair = self.pick(data)
        rows = pair.store.rows
        bits = data.draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
        real = torch.tensor(bits).view(rows, tokens)
        k, v = self.fresh(rows, HEADS, tokens, K_DIM), self.fresh(rows, HEADS, tokens, V_DIM)
        columns = self.fresh(2, rows, HEADS, tokens) if with_columns else None
        first = torch.tensor(pair.next, dtype=torch.int32)[:, None]
        positions = torch.where(real, first + real.cumsum(1).int() - 1, -1).int()
        added = real.sum(1).int().numpy()
        k, v = (x.to(self.storage.k_pages.dtype).float() for x in (k, v))
        if not self.attempt(lambda: pair.store.append(k, v, positions, added, columns, spare)):
            return
        for r in range(rows):
            for t in range(tokens):
                if not real[r, t]:
                    continue
                for h in range(HEADS):
                    side = [0.0, 0.0] if columns is None else columns[:, r, h, t].tolist()
                    pair.rows[r][h][int(positions[r, t])] = (k[r, h, t].tolist(), v[r, h, t].tolist(), side)
            pair.next[r] += int(added[r])

    def slots(self, pair, r, h):
        n = int(pair.store.counts[r, h])
        return pair.store.positions[r, h, :n].tolist()

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def overwrite(self, data):
        pair = self.pick(data)
        victims = torch.full((pair.store.rows, HEADS), -1, dtype=torch.int32)
        gone = []
        for r in range(pair.store.rows):
            for h in range(HEADS):
                slots = self.slots(pair, r, h)
                victims[r, h] = data.draw(st.integers(-1, len(slots) - 1))
                if victims[r, h] >= 0:
                    gone.append((r, h, slots[victims[r, h]]))
        if self.attempt(lambda: pair.store.overwrite(victims)):
            for r, h, position in gone:
                del pair.rows[r][h][position]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def keep(self, data):
        pair = self.pick(data)
        rows = pair.store.rows
        chosen = [
            [
                sorted(data.draw(st.sets(st.integers(0, n - 1)))) if (n := int(pair.store.counts[r, h])) else []
                for h in range(HEADS)
            ]
            for r in range(rows)
        ]
        width = max(1, max(len(c) for row in chosen for c in row))
        index = torch.full((rows, HEADS, width), -1, dtype=torch.int32)
        counts = torch.zeros(rows, HEADS, dtype=torch.int32)
        remaining = []
        for r in range(rows):
            for h, slots in enumerate(chosen[r]):
                index[r, h, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
                counts[r, h] = len(slots)
                held = self.slots(pair, r, h)
                remaining.append((r, h, {held[s] for s in slots}))
        if self.attempt(lambda: pair.store.keep(index, counts)):
            for r, h, positions in remaining:
                pair.rows[r][h] = {p: x for p, x in pair.rows[r][h].items() if p in positions}

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def crop(self, data):
        pair = self.pick(data)
        limits = [data.draw(st.integers(max(0, n - 5), n)) for n in pair.next]
        if self.attempt(lambda: pair.store.crop(torch.tensor(limits, dtype=torch.int32))):
            pair.next = limits
            pair.rows = [
                [{p: x for p, x in head.items() if p < limit} for head in row] for row, limit in zip(pair.rows, limits)
            ]

    @precondition(lambda self: self.pairs and len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data):
        pair = self.pick(data)
        rows = [[dict(head) for head in row] for row in pair.rows]
        self.pairs.append(Pair(pair.store.fork(), rows, list(pair.next)))

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def select_rows(self, data):
        pair = self.pick(data)
        rows = data.draw(st.lists(st.integers(0, pair.store.rows - 1), min_size=1, max_size=4))
        pair.store.select_rows(torch.tensor(rows))
        pair.rows = [[dict(head) for head in pair.rows[r]] for r in rows]
        pair.next = [pair.next[r] for r in rows]

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def release(self, data):
        pair = self.pick(data)
        pair.store.release()
        pair.rows = [[{} for _ in range(HEADS)] for _ in pair.rows]
        pair.next = [0] * len(pair.next)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def drop(self, data):
        del self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    @rule()
    def trim(self):
        self.storage.trim()

    @rule(pages=st.integers(0, 9))
    def reserve(self, pages):
        if self.attempt(lambda: self.storage.reserve(pages)):
            assert self.storage.pool.free_pages >= pages

    @invariant()
    def content_is_the_models(self):
        if not hasattr(self, "pairs"):
            return
        size, references = self.storage.page_size, Counter()
        for pair in self.pairs:
            store = pair.store
            assert store.rows == len(pair.rows)
            assert store.max_count >= int(store.counts.max())
            assert not store.even or bool((store.counts == store.max_count).all())
            keys, values = store.gather("keys"), store.gather("values")
            for r, row in enumerate(pair.rows):
                for h, expected in enumerate(row):
                    n = int(store.counts[r, h])
                    positions = store.positions[r, h, :n].tolist()
                    found = {
                        p: (keys[r, h, i].tolist(), values[r, h, i].tolist(), store.columns[:, r, h, i].tolist())
                        for i, p in enumerate(positions)
                    }
                    assert len(positions) == len(expected)
                    assert found == expected
                    table = store.table[r, h]
                    used = table[table >= 0].tolist()
                    assert len(used) == -(-n // size)
                    assert (table[len(used) :] == -1).all()
                    references.update(used)
        pool = self.storage.pool
        assert pool.used == len(references)
        assert pool.free_pages == pool.capacity - pool.used
        assert self.storage.k_pages.shape[0] == self.storage.v_pages.shape[0] == pool.capacity
        assert self.storage.limit is None or pool.capacity <= self.storage.limit

    def teardown(self):
        if hasattr(self, "pairs"):
            self.pairs.clear()
            assert self.storage.pool.used == 0


def test_any_sequence_of_changes(backend):
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
