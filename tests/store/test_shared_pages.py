"""What a store may write without asking the pool: no page that another holds too, no slot beyond its columns."""

import numpy as np
import torch

from kvcache.store import LayerStore, PageStorage

SIZE, HEADS, DIM = 4, 2, 8


def append(store: LayerStore, first: int, tokens: int) -> None:
    positions = torch.arange(first, first + tokens, dtype=torch.int32)[None]
    k = (positions.float()[:, None, :, None]).expand(1, HEADS, tokens, DIM).contiguous()
    store.append(k, -k, positions, np.full(1, tokens, np.int32), spare=0)


def test_a_slot_freed_by_eviction_may_lie_in_a_shared_page(backend):
    storage = PageStorage(SIZE, DIM, DIM, torch.float32, torch.device("cpu"))
    store = LayerStore(storage, 1, HEADS)
    append(store, 0, 2 * SIZE - 1)
    twin = store.fork()
    before = store.gather("keys").clone()
    # The victim's page becomes the twin's own; the last page, whose last slot is free now, stays shared.
    twin.overwrite(torch.zeros(1, HEADS, dtype=torch.int32))
    append(twin, 50, 1)
    assert torch.equal(store.gather("keys"), before)
    assert float(twin.gather("keys")[0, 0, -1, 0]) == 50
    append(store, 60, 1)
    assert float(twin.gather("keys")[0, 0, -1, 0]) == 50


def test_the_bound_of_the_counts_stays_within_the_columns(backend):
    """Rows that take turns to grow: the bound grows with every token, the counts with every other."""
    storage = PageStorage(SIZE, DIM, DIM, torch.float32, torch.device("cpu"))
    store = LayerStore(storage, 2, HEADS)
    for step in range(12):
        added = np.array([[1, 0], [0, 1], [1, 1]][step % 3], np.int32)
        positions = torch.tensor([[step if n else -1] for n in added], dtype=torch.int32)
        k = torch.randn(2, HEADS, 1, DIM)
        store.append(k, k, positions, added, spare=0)
        assert int(store.counts.max()) <= store.max_count <= store.capacity
        assert store.gather("keys").shape[2] == store.max_count
