"""Pages, tables and side columns: where entries live. Knows nothing of policies and nothing of transformers.

:class:`PageStorage` is the memory of one pool: two tensors of pages and the host object that counts references.
:class:`LayerStore` is one layer's part of it: which pages each (row, kv head) holds, how many entries, and their side
columns. All offsets are 64-bit; anything that needs pages either gets all of them or raises before it changes anything.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from ._C import OutOfPages, PagePool

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: How many entries every head of a row gains: [R] int32, or one number for all rows.
Added = np.ndarray | int


def _range(added: Added) -> tuple[int, int]:
    """The least and the most that a row gains."""
    return (added, added) if isinstance(added, int) else (int(added.min(initial=0)), int(added.max(initial=0)))


class PageStorage:
    """The pages of one pool: ``k_pages`` [P, S, Dk] and ``v_pages`` [P, S, Dv]; with ``bounds`` also the smallest and
    largest key of each page, ``bounds`` [P, 2, Dk], kept by the ops that write pages.

    Grows by doubling, up to ``limit`` pages (set by the cache from ``max_tokens``) or the machine's memory, and gives
    memory back when less than half of it is used after a bulk eviction.
    """

    def __init__(
        self, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device, bounds: bool = False
    ) -> None:
        self.page_size = page_size
        self.pool = PagePool(page_size)
        self.k_pages = torch.empty(0, page_size, k_dim, dtype=dtype, device=device)
        self.v_pages = torch.empty(0, page_size, v_dim, dtype=dtype, device=device)
        self.bounds = torch.empty(0, 2, k_dim, dtype=dtype, device=device) if bounds else None
        self.limit: int | None = None
        self._allowed: dict[int, int] = {}
        self.layers: weakref.WeakSet[LayerStore] = weakref.WeakSet()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return self.page_size * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one entry, key and value."""
        return (self.k_pages.shape[2] + self.v_pages.shape[2]) * self.k_pages.element_size()

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the storage has taken from the allocator, held pages and free ones, with their bounds."""
        return self.pool.capacity * self.page_bytes + (0 if self.bounds is None else self.bounds.nbytes)

    @property
    def _arrays(self) -> list[str]:
        return ["k_pages", "v_pages"] + ([] if self.bounds is None else ["bounds"])

    def allow(self, layer: int, pages: int) -> None:
        """Let ``layer`` hold ``pages`` pages; caches that share the storage share what their layers may hold."""
        self._allowed[layer] = pages
        self.limit = sum(self._allowed.values())

    def reserve(self, pages: int, spare: int = 0) -> None:
        """Make sure that ``pages`` pages are free, and ``spare`` more if there is room for them.

        Raises :class:`OutOfPages` when the limit or the memory does not allow it; nothing has changed then.
        """
        missing = pages - self.pool.free_pages
        if missing <= 0:
            return
        capacity = self.pool.capacity
        needed = capacity + missing
        if self.limit is not None and needed > self.limit:
            raise OutOfPages(
                f"{pages} more pages of {self.page_size} tokens are needed, but {self.pool.used} of the "
                f"{self.limit} that max_tokens allows are in use; raise max_tokens or use a policy that keeps less"
            )
        wanted = max(2 * capacity, needed + spare)
        if self.limit is not None:
            wanted = min(wanted, self.limit)
        for target in dict.fromkeys((wanted, needed)):
            try:
                self._resize(target)
                return
            except (RuntimeError, MemoryError) as error:  # the allocator refused
                failure = error
        raise OutOfPages(
            f"no memory for {needed} pages of {self.page_bytes} bytes ({self.pool.used} in use): {failure}"
        ) from None

    def _resize(self, capacity: int) -> None:
        arrays = [getattr(self, name) for name in self._arrays]
        grown = [x.new_empty(capacity, *x.shape[1:]) for x in arrays]
        used = self.pool.capacity
        for x, old in zip(grown, arrays):
            x[:used].copy_(old)
        self.pool.grow(capacity)
        for name, x in zip(self._arrays, grown):
            setattr(self, name, x)

    def trim(self, slack: int = 0) -> None:
        """Give memory back if less than half of the pages are used: live pages move together, tables follow.

        ``slack``: entries that every head will gain before something is evicted again.
        """
        # A step adds an entry to every head before it evicts one: that may take a page more for each.
        heads = sum(layer.rows * layer.heads for layer in self.layers)
        capacity = self.pool.used + heads * (slack // self.page_size) + min(heads, self.pool.used // 8) + 8
        if 2 * capacity > self.pool.capacity:
            return
        moved = torch.from_numpy(np.asarray(self.pool.relocate(capacity)))
        old = (moved >= 0).nonzero().squeeze(-1)
        new = moved[old].long()
        device = self.k_pages.device
        for name in self._arrays:
            pages = getattr(self, name)
            fresh = pages.new_empty(capacity, *pages.shape[1:])
            fresh[new.to(device)] = pages[old.to(device)]
            setattr(self, name, fresh)
        lookup = moved.numpy().astype(np.int32)
        for layer in self.layers:
            table = layer.table_host
            table[...] = np.where(table >= 0, lookup[np.maximum(table, 0)], -1)
            layer.upload_table()
        if device.type == "cpu":
            _return_free_memory()

    def copy(self, pairs: tuple[np.ndarray, np.ndarray]) -> None:
        """Carry out the page copies of a copy on write: (source, target) page ids."""
        if len(pairs[0]):
            device = self.k_pages.device
            source, target = (torch.from_numpy(np.asarray(x)).to(device) for x in pairs)
            ops.copy_pages(self.k_pages, self.v_pages, source, target, self.bounds)


class LayerStore:
    """Entries of one layer: ragged over rows and kv heads.

    table [R, H, M] int32, counts [R, H] int32, positions [R, H, C] int32, columns [N, R, H, C] float32; column 0 is
    the score, ``column_names`` names the others. See ``ops.reference`` for the layout.

    The pool works on the host. On a CPU it reads and writes ``table`` and ``counts`` themselves, through the numpy
    views ``table_host`` and ``counts_host``; on a GPU those are copies: the table follows what the pool wrote
    (:meth:`upload_table`), the host's counts what a kernel counted (:meth:`_count`). Pages that a head has given back
    may stay in the GPU's table, where nothing reads behind the count.
    """

    def __init__(self, storage: PageStorage, rows: int, heads: int, column_names: Sequence[str] = ()) -> None:
        self.storage = storage
        self.rows, self.heads = rows, heads
        self.column_names = ("score", *column_names)
        device = storage.k_pages.device
        self.table = torch.full((rows, heads, 0), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(rows, heads, dtype=torch.int32, device=device)
        self.positions = torch.zeros(rows, heads, 0, dtype=torch.int32, device=device)
        self.columns = torch.zeros(len(self.column_names), rows, heads, 0, device=device)
        self.max_count = 0  # an upper bound of counts, known without asking the device
        self.mirrored = device.type != "cpu"  # whether the host works on copies
        self.room = 0  # entries that every head can gain without a word to the pool
        self.even = True  # every head is known to hold max_count entries
        self._bind()
        storage.layers.add(self)

    def _bind(self) -> None:
        """Renew what the host sees of ``table`` and ``counts``; after every replacement of either."""
        self.table_host, self.counts_host = self.table.cpu().numpy(), self.counts.cpu().numpy()
        self._uploaded = self.table_host.copy() if self.mirrored else self.table_host
        self.room = 0

    def upload_table(self) -> None:
        """The pool wrote ``table_host``: the device's table follows."""
        if self.mirrored and not np.array_equal(self.table_host, self._uploaded):
            self.table.copy_(torch.from_numpy(self.table_host))
            self._uploaded = self.table_host.copy()

    def _count(self, counts: np.ndarray) -> None:
        """A kernel changed ``counts`` to these: the host's copy follows."""
        self.room = 0
        self.max_count = int(counts.max(initial=0))
        self.even = not counts.size or int(counts.min()) == self.max_count
        if self.mirrored:
            self.counts_host = counts

    def account(self) -> dict[str, Any]:
        """What :meth:`grew` and :meth:`lost` change, by attribute."""
        return {name: getattr(self, name) for name in ("max_count", "counts_host", "room", "even")}

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self.positions.shape[2]

    @property
    def pages(self) -> int:
        """Pages in the tables; a page shared by several rows counts once for each of them."""
        return int((self.table_host >= 0).sum())

    @property
    def shared(self) -> bool:
        """Whether some page belongs to another row or store as well."""
        pool = self.storage.pool
        return pool.shared_pages > 0 and pool.shared(self.table_host)

    def pages_needed(self, added: Added) -> int:
        """Fresh pages that appending ``added`` entries to every head takes, copies on write included."""
        _, most = _range(added)
        if most <= self.room:
            return 0
        self._widen(self.max_count + most)
        return self.storage.pool.pages_needed(self.table_host, self.counts_host, added)

    def _widen(self, entries: int) -> None:
        """Make room in table and columns for ``entries`` per head."""
        if entries <= self.capacity:
            return
        self.upload_table()
        width = max(-(-entries // self.storage.page_size), 2 * self.table.shape[2])
        more = width - self.table.shape[2]
        pad = torch.nn.functional.pad
        self.table = pad(self.table, (0, more), value=-1)
        self.positions = pad(self.positions, (0, more * self.storage.page_size))
        self.columns = pad(self.columns, (0, more * self.storage.page_size))
        self._bind()

    def _narrow(self, ahead: int = 1) -> None:
        """Give back most of table and columns where fewer than half of the slots are still in use, or will be after
        ``ahead`` more entries."""
        width = -(-(self.max_count + ahead) // self.storage.page_size)
        if 2 * width > self.table.shape[2]:
            return
        self.upload_table()
        slots = width * self.storage.page_size
        self.table = self.table[..., :width].contiguous()
        self.positions = self.positions[..., :slots].contiguous()
        self.columns = self.columns[..., :slots].contiguous()
        self._bind()

    # -- changes ----------------------------------------------------------------------------------------------------

    def append(
        self,
        k: Tensor,
        v: Tensor,
        new_positions: Tensor,
        added: Added,
        new_columns: Tensor | None = None,
        spare: int | None = None,
    ) -> None:
        """Store k [R, H, T, Dk] and v [R, H, T, Dv] at ``new_positions`` [R, T] int32 (-1: not stored).

        ``added`` counts the stored tokens of each row. With ``spare`` the pages are reserved here, and that
        many more if the storage has to grow; None: the caller has done it. Raises :class:`OutOfPages` before anything
        changes.
        """
        if _range(added)[1] == 0:
            return
        if spare is not None:
            self.storage.reserve(self.pages_needed(added), spare)
        self.extend(added)
        self.write(k, v, new_positions, new_columns)
        self.grew(added)

    def extend(self, added: Added) -> None:
        """Make the slots of ``added`` more entries per head writable; the pages are reserved."""
        pool, (least, most) = self.storage.pool, _range(added)
        if most <= self.room:
            return
        pages = pool.used
        self.storage.copy(pool.extend(self.table_host, self.counts_host, added))
        changed = self.mirrored and pool.used != pages  # not at every step: a page holds many
        if changed and ((self.table_host != self._uploaded) & (self.table_host >= 0)).any():
            self.upload_table()
        if least == most:  # a row that adds nothing may share its last page
            room = most + int((-(self.counts_host + most) % self.storage.page_size).min())
            self.room = min(room, self.capacity - self.max_count)  # an upper bound, which must fit as well

    def write(self, k: Tensor, v: Tensor, new_positions: Tensor, new_columns: Tensor | None = None) -> None:
        """What :meth:`append` does on the device, behind :meth:`extend`; :meth:`grew` tells the host."""
        s = self.storage
        ops.append(
            s.k_pages, s.v_pages, self.table, self.counts, self.positions, self.columns, k, v, new_positions,
            new_columns, s.bounds,
        )  # fmt: skip

    def grew(self, added: Added) -> None:
        """The host's account of a :meth:`write`."""
        least, most = _range(added)
        if self.mirrored:
            self.counts_host = self.counts_host + (added if isinstance(added, int) else added[:, None])
        self.max_count += most
        self.even = self.even and least == most
        self.room = max(self.room - most, 0)

    def fill(self, k: Tensor, v: Tensor, counts: Tensor, positions: Tensor, columns: Tensor) -> None:
        """Take over dense entries by slot, ragged over rows and heads; the store must be empty.

        k, v [R, H, n, D]; counts [R, H]; positions [R, H, n]; columns [N, R, H, n].
        """
        n, s = k.shape[2], self.storage
        pairs, device = self.rows * self.heads, self.table.device
        self._widen(n)
        table_host = self.table_host.reshape(pairs, 1, -1)
        added = np.ascontiguousarray(counts.cpu().numpy().astype(np.int32).reshape(-1))
        s.reserve(int((-(-added // s.page_size)).sum()))
        s.copy(s.pool.extend(table_host, np.zeros((pairs, 1), np.int32), added))
        self.upload_table()
        table = self.table.view(pairs, 1, -1)
        slots = torch.arange(n, dtype=torch.int32, device=device).expand(pairs, -1)
        limits = torch.from_numpy(added).to(device)
        where = torch.where(slots < limits[:, None], slots, -1).contiguous()
        held = torch.zeros(pairs, 1, dtype=torch.int32, device=device)
        flat_positions = torch.zeros(pairs, 1, self.capacity, dtype=torch.int32, device=device)
        flat_columns = torch.zeros(len(self.column_names), pairs, 1, self.capacity, device=device)
        ops.append(
            s.k_pages, s.v_pages, table, held, flat_positions, flat_columns, k.reshape(pairs, 1, n, k.shape[3]),
            v.reshape(pairs, 1, n, v.shape[3]), where, None, s.bounds,
        )  # fmt: skip
        self.counts.copy_(counts)
        self._count(added.reshape(self.rows, self.heads))
        self.positions[..., :n] = positions
        self.columns[..., :n] = columns

    def keep(self, index: Tensor, index_counts: Tensor, ahead: int = 1) -> None:
        """Keep only the slots ``index`` [R, H, K] int32, ascending, ``index_counts`` [R, H] of them; free the rest.

        ``ahead``: entries for which table and columns keep room.
        """
        s, pool = self.storage, self.storage.pool
        wanted = np.ascontiguousarray(index_counts.cpu().numpy())
        target, target_host = self.table, self.table_host
        shared = self.shared
        if shared:
            target_host = np.full_like(self.table_host, -1)
            # Every head asks for its own number of entries: seen by the pool as rows of one head.
            flat = wanted.reshape(-1)
            s.reserve(int(np.sum(-(-flat // s.page_size))))
            pool.extend(target_host.reshape(len(flat), 1, -1), np.zeros((len(flat), 1), np.int32), flat)
            target = torch.from_numpy(target_host).to(self.table.device)
        ops.compact(
            s.k_pages, s.v_pages, self.table, target, self.counts, self.positions, self.columns, index, index_counts,
            s.bounds,
        )  # fmt: skip
        self._count(wanted.copy())
        if shared:
            pool.release(self.table_host)
            self.table = target
            if self.mirrored:
                self.table_host, self._uploaded = target_host, target_host.copy()
            else:
                self._bind()
        else:
            pool.shrink(self.table_host, self.counts_host)
            self.upload_table()
        self._narrow(ahead)

    def unshare(self) -> None:
        """Have every page for this store and row alone: what others hold as well is copied. May raise OutOfPages."""
        if not self.shared:
            return
        pages = -(-self.counts_host // self.storage.page_size)
        self.storage.reserve(int(pages.sum()))
        self.storage.copy(self.storage.pool.unshare(self.table_host, np.zeros_like(pages), pages))
        self.upload_table()

    def replace(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """Write keys [R, H, m, Dk] and values [R, H, m, Dv] (None: as they are) over the entries at ``slots`` [R, H, m]
        int64 (-1: none). Their pages must not be shared (:meth:`unshare`), and have no bounds."""
        s = self.storage
        assert s.bounds is None
        some = slots >= 0
        pages = self.table.gather(2, slots.clamp(min=0) // s.page_size)[some].long()
        places = (slots % s.page_size)[some]
        for target, new in ((s.k_pages, keys), (s.v_pages, values)):
            if new is not None:
                target[pages, places] = new[some].to(target.dtype)

    def overwrite(self, victims: Tensor) -> None:
        """Evict one slot ``victims`` [R, H] int32 of each head (-1: none), in place."""
        s, pool = self.storage, self.storage.pool
        chosen = victims.cpu().numpy()
        evicts = chosen >= 0
        if self.shared:
            page = np.where(evicts, chosen // s.page_size, 0).astype(np.int32)
            touched = (page + evicts).astype(np.int32)
            s.reserve(int(np.count_nonzero(evicts)))
            s.copy(pool.unshare(self.table_host, page, touched))
            self.upload_table()
        ops.overwrite(s.k_pages, s.v_pages, self.table, self.counts, self.positions, self.columns, victims, s.bounds)
        self.lost(evicts)

    def lost(self, entries: np.ndarray | None = None) -> None:
        """The host's account of an eviction that took one entry from the heads ``entries`` [R, H] bool.

        None: from every head, of a store that is ``even``.
        """
        pool = self.storage.pool
        # Without room so far, the slot that became free may lie in a page that others hold as well.
        own = self.room > 0 or pool.shared_pages == 0
        if entries is None:
            room = self.room + 1 if own else 0
            self.max_count -= 1
            if self.mirrored:
                self.counts_host = self.counts_host - 1
            emptied = self.max_count % self.storage.page_size == 0
        else:
            room = self.room + 1 if own and entries.all() else 0
            self._count(self.counts_host - entries.astype(np.int32) if self.mirrored else self.counts_host)
            emptied = True
        self.room = 0 if emptied and pool.shrink(self.table_host, self.counts_host) else room

    def crop(self, limits: Tensor) -> None:
        """Drop every entry whose position is at or beyond ``limits`` [R] int32, and pages that hold nothing.

        Needs pages, and raises :class:`OutOfPages` before anything changes, only where such entries lie among others
        in a table with shared pages: see :meth:`pages_to_crop`.
        """
        stays = self._staying(limits)
        counts = stays.sum(-1, dtype=torch.int32)
        if self._is_tail(stays, counts):  # the rule: what came last is what leaves
            self.counts.copy_(counts)
            self._count(counts.cpu().numpy().copy())
            self.storage.pool.shrink(self.table_host, self.counts_host)
            self.upload_table()
            self._narrow()
            return
        none = torch.zeros_like(self.counts)
        far = torch.full_like(limits, torch.iinfo(torch.int32).max)
        index, counts = ops.topk(
            self.columns[0], self.counts, self.positions, none, limits, far, width=max(self.max_count, 1)
        )
        self.keep(index, counts)

    def pages_to_crop(self, limits: Tensor) -> int:
        """Fresh pages that :meth:`crop` takes."""
        if not self.shared:
            return 0
        stays = self._staying(limits)
        counts = stays.sum(-1, dtype=torch.int32)
        return 0 if self._is_tail(stays, counts) else int((-(-counts // self.storage.page_size)).sum())

    @property
    def live(self) -> Tensor:
        """Which slots hold an entry, bool [R, H, C]."""
        return torch.arange(self.capacity, device=self.counts.device) < self.counts[..., None]

    def _staying(self, limits: Tensor) -> Tensor:
        """Which slots hold an entry before ``limits`` [R], bool [R, H, C]."""
        return self.live & (self.positions < limits[:, None, None])

    def _is_tail(self, stays: Tensor, counts: Tensor) -> bool:
        """Whether the entries that stay are the first ``counts`` [R, H] of each head."""
        first = torch.arange(self.capacity, device=counts.device) < counts[..., None]
        return torch.equal(stays, first)

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes a copy of the old row ``rows[r]`` (int64 [R']); pages are shared, not copied."""
        self.upload_table()
        pool = self.storage.pool
        before, device_rows = self.table_host, rows.to(self.table.device)
        self.table = self.table[device_rows].contiguous()
        self.counts = self.counts[device_rows].contiguous()
        self.positions = self.positions[device_rows].contiguous()
        self.columns = self.columns[:, device_rows].contiguous()
        self.rows = len(rows)
        self._bind()
        pool.retain(self.table_host)
        pool.release(before)

    def join(self, other: LayerStore) -> None:
        """Take over the rows of ``other``, a store of the same storage and heads, behind the own ones; empty then."""
        self._widen(other.max_count)
        other._widen(self.max_count)
        self.upload_table()
        other.upload_table()
        pages = max(self.table.shape[2], other.table.shape[2])

        def wide(x: Tensor, width: int, value: int = 0) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=value)

        slots = pages * self.storage.page_size
        self.table = torch.cat([wide(x.table, pages, -1) for x in (self, other)])
        self.counts = torch.cat([self.counts, other.counts])
        self.positions = torch.cat([wide(x.positions, slots) for x in (self, other)])
        self.columns = torch.cat([wide(x.columns, slots) for x in (self, other)], 1)
        self.rows += other.rows
        self.even = self.even and other.even and self.max_count == other.max_count
        self.max_count = max(self.max_count, other.max_count)
        self._bind()
        # The pages are ours now: nothing is left for the other store to release.
        other.rows, other.max_count, other.even = 0, 0, True
        other.table, other.counts = other.table[:0], other.counts[:0]
        other.positions, other.columns = other.positions[:0], other.columns[:, :0]
        other._bind()

    def fork(self) -> LayerStore:
        """A second store with the same entries; pages are shared until one side writes."""
        self.upload_table()
        twin = LayerStore(self.storage, self.rows, self.heads, self.column_names[1:])
        for name in ("table", "counts", "positions", "columns"):
            setattr(twin, name, getattr(self, name).clone())
        twin.max_count, twin.even = self.max_count, self.even
        twin._bind()
        self.room = 0
        self.storage.pool.retain(twin.table_host)
        return twin

    def release(self) -> None:
        """Give every page back; the store is empty afterwards."""
        self.storage.pool.release(self.table_host)
        self.upload_table()
        self.counts.zero_()
        self._count(np.zeros_like(self.counts_host))

    def __del__(self) -> None:
        # A fork that goes out of use must not hold on to the pages that it shares.
        if hasattr(self, "table_host"):
            self.storage.pool.release(self.table_host)

    # -- reading ----------------------------------------------------------------------------------------------------

    def at(self, what: str, slots: Tensor) -> Tensor:
        """``what`` ("keys" or "values") of the entries at ``slots`` [R, H, m] int64, [R, H, m, D]."""
        pages, size = self.storage.k_pages if what == "keys" else self.storage.v_pages, self.storage.page_size
        return pages[self.table.gather(2, slots // size).long(), slots % size]

    def gather(self, what: str, width: int | None = None) -> Tensor:
        """Dense copy of ``what`` ("keys" or "values") in slot order, [R, H, width, D]; dead slots are zero."""
        if self.mirrored and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a layer wants its entries densely, whose number changes with every token")
        pages = self.storage.k_pages if what == "keys" else self.storage.v_pages
        return ops.reference.gather_pages(pages, self.table, self.counts, self.max_count if width is None else width)


def _return_free_memory() -> None:
    """Make the C allocator hand freed memory back to the machine: glibc keeps blocks below 32 MiB for reuse."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
