"""One forward of the model as the engine sees it, and what attention reads and is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .store import Added, LayerStore

if TYPE_CHECKING:
    from .layer_state import Layer


@dataclass(frozen=True)
class Repeats:
    """Rows of a forward that are alike: ``unique`` [U] int64, one of each kind; ``inverse`` [R]: the kind of a row."""

    unique: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, first: Tensor) -> Repeats | None:
        """From the first row [R] that equals each; None if all differ."""
        unique, inverse = first.unique(return_inverse=True)
        return None if len(unique) == len(first) else cls(unique, inverse)

    def once(self, x: Tensor) -> Tensor:
        """``x`` [R, ...] -> [U, ...]."""
        return x[self.unique.to(x.device)]

    def spread(self, x: Tensor) -> Tensor:
        """``x`` [U, ...] -> [R, ...]."""
        return x[self.inverse.to(x.device)]


@dataclass(frozen=True)
class Part:
    """Rows of a batch on which a layer runs while the others skip it: ``rows`` [n] int64 of ``total``."""

    rows: Tensor
    total: int

    def take(self, x: Tensor) -> Tensor:
        """``x`` [total, ...] -> [n, ...]."""
        return x.index_select(0, self.rows)

    def spread(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] -> [total, ...], zeros in the other rows."""
        return x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.rows, x)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """``x`` [total, ...] with ``rows`` [n, ...] in place of its own."""
        return x.index_copy(0, self.rows, rows)


@dataclass(frozen=True)
class Counted:
    """The queries of a forward that a statistic counts: the ``last`` real ones of each row, 0 for all; ``keep``: the
    factor of what earlier queries have left, ``idle``: that of rows without any new one."""

    last: int
    keep: float
    idle: float = 1.0

    def keep_of(self, asks: Tensor) -> Tensor | float:
        """The factor for rows of which ``asks`` [R] bool says whether they have a new query: [R, 1, 1], or for all."""
        return self.keep if self.keep == self.idle else torch.where(asks, self.keep, self.idle)[:, None, None]


@dataclass
class Narrow:
    """The tokens of a forward that run its later layers: a policy's answer, and what these layers are given.

    ``runs`` bool [R, T], on the CPU, rows as the engine counts them. :meth:`settle` makes ``step``, the forward that
    the later layers see: of K columns, the most that a row has, ``columns`` [rows of the model, K] int64 of the T;
    where the inputs of layers cannot be cut, of all T columns (``columns`` None), those that do not run as padding.
    ``active`` [rows of the model, K] bool says which columns run; shorter rows are filled up with others.
    """

    runs: Tensor
    step: Step | None = None
    columns: Tensor | None = None
    active: Tensor | None = None
    even: bool = False  # no row is filled up
    pieces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cut for all layers: by id, with the whole

    @classmethod
    def of(cls, step: Step, runs: Tensor) -> Narrow:
        """Of the tokens ``runs`` bool [R, T], and of the last column of the forward, from whose output generation
        continues: it is padding in rows padded on the right."""
        whole = step.whole or step
        last = (step.at == whole.start + whole.tokens - 1) & (step.reach >= 0)
        return cls(runs | last)

    def settle(self, whole: Step, cut: bool) -> Step:
        """The step of the later layers, of the tokens of ``whole`` alone."""
        if self.step is not None:
            return self.step
        active, order = self.runs, None
        if cut:
            most = int(active.sum(1).max())
            order = (~active).int().argsort(dim=1, stable=True)[:, :most]
            active = active.gather(1, order)
        parts = (whole.positions, whole.reach, whole.at)
        positions, reach, at = parts if order is None else (x.gather(1, order) for x in parts)
        positions, reach = torch.where(active, positions, -1), torch.where(active, reach, -1)
        added = (positions >= 0).sum(1, dtype=torch.int32).numpy()
        step = Step(
            whole.start, positions.shape[1], whole.rows, positions, reach, whole.before, whole.after, added,
            whole.real, whole.prompt, whole.repeats,
        )  # fmt: skip
        step.columns, step.whole, step.counted = at, whole.whole or whole, whole.counted
        if whole.repeats is not None:
            active = whole.repeats.spread(active)
            order = None if order is None else whole.repeats.spread(order)
        self.step, self.columns, self.active, self.even = step, order, active, bool(active.all())
        return step

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The columns that run of ``x``, whose dimension ``dim`` are the T: rows first, or one for all."""
        if self.columns is None:
            return x
        index = self.columns.to(x.device)
        shape = [len(index), *[1] * (x.ndim - 1)]
        shape[dim] = index.shape[1]
        wanted = [len(index), *x.shape[1:]]
        wanted[dim] = index.shape[1]
        return x.expand(len(index), *x.shape[1:]).gather(dim, index.view(shape).expand(wanted))

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """``x`` [rows, T, d] with ``new`` [rows, K, d] in place of the columns that run."""
        assert self.active is not None
        active = self.active.to(x.device)[:, :, None]
        if self.columns is None:
            return torch.where(active, new, x)
        if not self.even:
            new = torch.where(active, new, self.take(x))  # what fills a row up stays as it was
        return x.scatter(1, self.columns.to(x.device)[:, :, None].expand_as(new), new)


@dataclass
class Step:
    """One forward of the model: which tokens it brings and where they stand.

    ``positions`` [R, T] int32 counts the real tokens of each row, -1 marks padding; ``reach`` [R, T] int32 is the last
    position that each query may read: its own, or for padding that of the real token before it (its output is what
    generation continues from when a row is padded on the right). ``before`` and ``after`` [R] int32 are the real
    tokens of each row before and after this forward; ``added`` is their difference, as numpy, or one number where that
    is the same for all. All of it is on the CPU.
    """

    start: int
    tokens: int
    rows: int
    positions: Tensor
    reach: Tensor
    before: Tensor
    after: Tensor
    added: Added
    real: Tensor | None  # bool [R, start + T], which columns hold real tokens; None: all
    prompt: bool
    repeats: Repeats | None = None  # the tensors here, and the stores, have one row of each kind until the step ends
    routed: dict[int, Tensor] = field(default_factory=dict)  # layer -> bool [R, T]: tokens that run it
    skipped: set[int] = field(default_factory=set)  # layers that no token runs
    columns: Tensor | None = None  # int64 [R, T]: those of the tokens among all that were seen; None: the last T
    whole: Step | None = None  # the forward of which this is the part that runs later layers
    narrow: Narrow | None = None  # the tokens that run the layers behind the one that attended last
    counted: Counted | None = None  # queries that the policy's statistic counts; None: none of them
    ready: bool = False  # the host has settled all that this forward changes: its layers only launch kernels
    wrote: list[Layer] = field(default_factory=list)  # of a ready step: the layers that have stored its tokens
    rewind: tuple[int, Tensor, Tensor | None] | None = None  # what was seen before the engine counted this forward
    evicted: list[Layer] | None = None  # layers that a captured graph has evicted from already
    part: Part | None = None  # while a layer runs on some rows alone: what it hands over has these
    parts: dict[tuple, Part | None] = field(default_factory=dict)  # by what is active, for layers.RoutedForward
    pieces: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # its tensors of some rows, with the whole
    angles: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)  # turn queries back to position 0
    single_angles: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of the only query's rows
    plans: dict[int, Tensor] = field(default_factory=dict)  # layer -> how a GPU shares out its entries
    _starts: dict[int, Tensor] = field(default_factory=dict)
    _decode_starts: dict[int, Tensor] = field(default_factory=dict)
    _copies: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def at(self) -> Tensor:
        """Columns of the tokens among all that were seen, int64 [R, T]."""
        if self.columns is not None:
            return self.columns
        return torch.arange(self.start, self.start + self.tokens).expand(self.rows, -1)

    def runs(self, layer: int) -> Tensor | None:
        """Tokens that run ``layer``, bool [rows of the model, T]; None: all."""
        active = self.routed.get(layer)
        return active if active is None or self.repeats is None else self.repeats.spread(active)

    def on(self, device: torch.device, x: Tensor) -> Tensor:
        """A tensor of this step where a layer needs it; carried over once for all layers."""
        if x.device == device:
            return x
        key = (id(x), device)
        if key not in self._copies:
            self._copies[key] = (x, x.to(device))  # with x itself, so that its id stays its own
        return self._copies[key][1]

    @property
    def brings(self) -> int:
        """Real tokens of this forward, in all rows."""
        return self.rows * self.added if isinstance(self.added, int) else int(self.added.sum())

    @property
    def padded(self) -> bool:
        """Whether some token of this forward is padding."""
        return self.brings != self.rows * self.tokens

    def window_start(self, window: int, ahead: int = 0) -> Tensor:
        """First position that each query may read, [R, T] int32; ``ahead=1``: the query one column later.

        Windows are measured in columns, padding included, as transformers' masks do.
        """
        key = window * 2 + ahead
        if key not in self._starts:
            column = (self.at + (ahead + 1 - window)).clamp(min=0)
            if self.real is None:
                start = column.int()
            else:
                passed = torch.nn.functional.pad(self.real.int().cumsum(1, dtype=torch.int32), (1, 0))
                start = passed.gather(1, column.clamp(max=passed.shape[1] - 1))
            self._starts[key] = start.contiguous()
        return self._starts[key]

    def decode_start(self, window: int, ahead: int = 0) -> Tensor:
        """First position that the one query of each row may read, [R] int32; ``ahead=1``: that of the next step."""
        key = window * 2 + ahead
        if key not in self._decode_starts:
            self._decode_starts[key] = self.window_start(window, ahead)[:, 0].contiguous()
        return self._decode_starts[key]

    def place(self, x: Tensor, there: Tensor) -> None:
        """``there`` is what :meth:`on` has to give for ``x``."""
        self._copies[(id(x), there.device)] = (x, there)

    def column_of(self, positions: Tensor) -> Tensor:
        """Column of each position: int64 like ``positions`` [R, ...]."""
        if self.real is None:
            return positions.long()
        order = torch.argsort(~self.real, dim=1, stable=True)  # real columns first, in order
        order = order.to(positions.device)
        flat = positions.reshape(positions.shape[0], -1).long().clamp(0, order.shape[1] - 1)
        return order.gather(1, flat).view(positions.shape)


class StepInputs:
    """Where a GPU finds what the host says about each step of one token: always the same memory, for captured graphs.

    The number of real tokens of each row ``before`` and ``after`` the step, its ``positions`` and, for every window
    size, the first position that its query and the next one may read; all int32, [R] or [R, 1].
    """

    def __init__(self, rows: int, windows: tuple[int, ...], device: torch.device) -> None:
        self.windows = windows
        self.block = torch.zeros(3 + 2 * len(windows), rows, dtype=torch.int32, device=device)
        self.before, self.after, positions, *self.starts = self.block.unbind()
        self.positions = positions[:, None]

    def load(self, step: Step) -> None:
        """Carry over what ``step`` brings, in one copy, and let it be found there."""
        starts = [step.decode_start(w, ahead) for w in self.windows for ahead in (0, 1)]
        self.block.copy_(torch.stack([step.before, step.after, step.positions[:, 0], *starts]))
        step.place(step.positions, self.positions)
        for start, there in zip(starts, self.starts):
            step.place(start, there)


@dataclass
class Pages:
    """What attention reads: a layer's own pages, or dense keys and values seen as one page per (row, head)."""

    k: Tensor
    v: Tensor
    table: Tensor
    counts: Tensor
    positions: Tensor

    @classmethod
    def of(cls, store: LayerStore) -> Pages:
        s = store.storage
        return cls(s.k_pages, s.v_pages, store.table, store.counts, store.positions)

    @classmethod
    def dense(cls, k: Tensor, v: Tensor, counts: Tensor, positions: Tensor) -> Pages:
        """k [R, H, n, Dk], v [R, H, n, Dv], counts [R, h], positions [R, h, n] with h dividing H."""
        rows, heads, width, _ = k.shape
        spread = heads // counts.shape[1]
        table = torch.arange(rows * heads, dtype=torch.int32, device=k.device).view(rows, heads, 1)
        return cls(
            k.reshape(rows * heads, width, -1).contiguous(),
            v.reshape(rows * heads, width, -1).contiguous(),
            table,
            counts.repeat_interleave(spread, 1).contiguous(),
            positions[..., :width].repeat_interleave(spread, 1).contiguous(),
        )


@dataclass(slots=True)
class Attention:
    """What the model asks of one attention call besides q, k, v."""

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    mask: Tensor | None = None  # bool [R, 1 | heads, T, columns seen]
    # Keys and values of the query heads from stored entries, where the queries are not those of what is stored (MLA).
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
