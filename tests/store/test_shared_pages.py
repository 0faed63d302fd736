"""What one store may write without asking the pool: never a page that another store holds too."""

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
