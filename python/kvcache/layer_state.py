"""One layer of a cache, and the view of it that a policy is shown."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .ops.two_stage import best_pages, two_stage_selection
from .policies.axes import Selection
from .policies.budget import FAR
from .step import Attention, Counted, Pages, Step
from .store import LayerStore

if TYPE_CHECKING:
    from .engine import Engine
    from .self_attending import SlotProbabilities, Watch

#: What ops.select_tokens counts, in its order.
EVENTS = ("selections", "reuses")
#: The attribute under which keys and values that ``update()`` returned carry their layer.
HANDLE = "_kvcache_layer"


class Layer:
    """One layer of a cache: its entries and what its policy remembers."""

    def __init__(self, engine: Engine, index: int, window: int | None) -> None:
        # Weak: a cycle would keep the pages of a dropped cache until some garbage collection.
        self._engine = weakref.ref(engine)
        self.index, self.window = index, window
        self.store: LayerStore | None = None
        self.group = 1
        self.scale = 1.0  # of the logits of the last attention
        self.state: dict[str, Any] = {}
        self._counters: Counter[str] = Counter()
        self.events: Tensor | None = None  # [2] int32 on the layer's device, EVENTS that no counter has seen yet
        self.forget_budgets()
        # What is not yet known to be accepted.
        self.pending: list[RecordedQueries | SlotProbabilities | ObservedQueries] = []
        self.was_empty = True
        self.paged = True  # False: transformers' own layer, which holds nothing here
        self.expands: str | None = None  # the tier whose models want all entries densely at every step, if it is one
        self.watch: Watch | None = None  # while a model that computes attention itself does so
        self.new: tuple[Tensor, Tensor] | None = None
        self.hidden: Tensor | None = None  # [R, T, size] what entered attention, until its keys and values are stored
        # What abort() puts back: (the forward that it belongs to, state, pending forwards, tensors and their copies).
        self.undo: tuple[Step, dict[str, Any], int, list[tuple[Tensor, Tensor]]] | None = None
        self.saved: dict[str, Tensor] = {}  # memory of those copies

    @property
    def engine(self) -> Engine:
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def counters(self) -> Counter[str]:
        """Events so far. What a device has counted is fetched, which waits for it."""
        if self.events is not None:
            for name, times in zip(EVENTS, self.events.cpu().tolist()):
                if times:
                    self._counters[name] += times
            self.events.zero_()
        return self._counters

    @counters.setter
    def counters(self, counters: Counter[str]) -> None:
        self._counters, self.events = counters, None

    def view(self) -> LayerView:
        return LayerView(self)

    def count(self, event: str, times: int = 1) -> None:
        """Add to an event counter; asks no device."""
        self._counters[event] += times

    def excess(self) -> int:
        """By how many entries the head that is most over its budget is over it; negative if none reaches its own."""
        assert self.store is not None
        if self.store.even and self.even_budgets:
            return self.store.max_count - self.smallest_budget
        return int((self.store.counts_host - self.budgets_host).max())

    def heads_over(self) -> np.ndarray | None:
        """Heads over their budgets, [R, H] bool; None: all, and all alike."""
        assert self.store is not None
        even = self.store.even and self.even_budgets and self.store.max_count > self.smallest_budget
        return None if even else self.store.counts_host > self.budgets_host

    def forget_budgets(self) -> None:
        self.budgets: Tensor | None = None  # [R, H] int32, set when a prompt ends; on the layer's device
        self.recent: Tensor | None = None  # [R] int32, likewise
        self.budgets_host = np.zeros((0, 0), np.int32)
        self.recent_key = b""  # the same for layers that protect the same
        self.smallest_budget = FAR
        self.even_budgets = False  # all of them are the smallest
        self.surely_evicts = False  # a head over its budget always has an entry that is not protected

    def set_budgets(self, budgets: Tensor | None, recent: Tensor | None) -> None:
        """Entries that each head may keep, [R, H] int32, and newest ones that are protected, [R] int32."""
        assert self.store is not None
        device = self.store.counts.device
        self.budgets = None if budgets is None else budgets.to(device).contiguous()
        self.recent = None if recent is None else recent.to(device)
        self.budgets_host = np.zeros((0, 0), np.int32) if self.budgets is None else self.budgets.cpu().numpy()
        self.smallest_budget = int(self.budgets_host.min(initial=FAR))
        self.even_budgets = int(self.budgets_host.max(initial=0)) == self.smallest_budget
        sinks = self.engine.policy.sinks if self.window is None else 0
        newest = np.zeros(0, np.int64) if recent is None else recent.cpu().numpy().astype(np.int64)
        self.recent_key = newest.tobytes()
        protected = 0 if recent is None else newest[:, None] + sinks
        self.surely_evicts = bool((self.budgets_host >= protected).all())


@dataclass(frozen=True)
class RecordedQueries:
    """Queries whose attention mass waits for word of which tokens were accepted: arguments of ``Engine._collect``."""

    q: Tensor
    positions: Tensor
    lse: Tensor
    start: Tensor | None
    mask: Tensor | None
    ask: Attention
    counted: Counted

    def collect(self, engine: Engine, layer: Layer, limits: Tensor) -> None:
        """Add the mass of the queries before ``limits`` [R] to the scores."""
        assert layer.store is not None
        accepted = torch.where(self.positions < limits[:, None], self.positions, -1)
        pages = engine.indexed(layer) if engine.by_index else Pages.of(layer.store)
        if self.ask.expand is not None:
            entries = self.ask.expand(*(layer.store.gather(x).to(self.q.dtype) for x in ("keys", "values")))
            pages = Pages.dense(*entries, layer.store.counts, layer.store.positions)
        engine._collect(layer, pages, self.q, accepted, self.lse, self.start, self.mask, self.ask, self.counted)

    def select_rows(self, rows: Tensor) -> RecordedQueries:
        """Of the rows ``rows`` [R'] int64 alone."""
        start, mask = (None if x is None else x[rows] for x in (self.start, self.mask))
        ask = replace(self.ask, mask=None)  # what it hid is in ``mask``
        return RecordedQueries(self.q[rows], self.positions[rows], self.lse[rows], start, mask, ask, self.counted)


@dataclass(frozen=True)
class ObservedQueries:
    """Queries q [R, Hq, T, D] at ``positions`` [R, T] that a policy observes once it is known which were accepted."""

    q: Tensor
    positions: Tensor

    def collect(self, engine: Engine, layer: Layer, limits: Tensor) -> None:
        """Show the policy the queries before ``limits`` [R]."""
        accepted = torch.where(self.positions < limits[:, None], self.positions, -1)
        engine.policy.observe(layer.view(), self.q, accepted)

    def select_rows(self, rows: Tensor) -> ObservedQueries:
        """Of the rows ``rows`` [R'] int64 alone."""
        return ObservedQueries(self.q[rows], self.positions[rows])


class LayerView:
    """A layer as a policy sees it. Tensors are views: read them, do not write them. A policy may write to nothing but
    its own columns, while it scores or merges: what an entry is worth may become known later than the entry, and once.

    ``counts`` [rows, heads] int32; ``positions`` and ``scores`` [rows, heads, capacity] (slots at or beyond the count
    are garbage); ``tokens`` [rows] int32: real tokens of each row so far; ``prompt_tokens`` [rows] int32, on the CPU:
    the same when the last prompt ended; ``state``: the policy's own memory of this layer, a dict of values and of
    tensors whose first dimension is the row.
    """

    def __init__(self, layer: Layer) -> None:
        assert layer.store is not None
        self._layer, self._store = layer, layer.store

    index = property(lambda self: self._layer.index, doc="Index of the decoder layer.")
    rows = property(lambda self: self._store.rows, doc="Rows of the batch.")
    heads = property(lambda self: self._store.heads, doc="Key-value heads.")
    group = property(lambda self: self._layer.group, doc="Query heads per kv head.")
    scale = property(lambda self: self._layer.scale, doc="By what the model multiplies logits, as it last attended.")
    all_heads = property(
        lambda self: self.heads * (1 if self._layer.engine.parallel is None else self._layer.engine.parallel.size),
        doc="Key-value heads of the layer on all ranks that share it.",
    )
    counts = property(lambda self: self._store.counts)
    positions = property(lambda self: self._store.positions)
    scores = property(lambda self: self._store.columns[0])
    live = property(lambda self: self._store.live, doc="Which slots hold an entry, [rows, heads, capacity] bool.")
    device = property(lambda self: self._store.counts.device, doc="Where the layer's tensors are.")
    tokens = property(lambda self: self._layer.engine.tokens_on(self.device))
    prompt_tokens = property(lambda self: self._layer.engine.prompt_tokens)
    num_layers = property(lambda self: len(self._layer.engine.layers))
    state = property(lambda self: self._layer.state)
    page_size = property(lambda self: self._store.storage.page_size, doc="Entries per page.")
    recent = property(
        lambda self: self._layer.recent, doc="Newest entries protected, [rows] int32; None: not fixed yet."
    )
    budgets = property(
        lambda self: self._layer.budgets,
        doc="Entries that each head may keep, [rows, heads] int32; None: not fixed yet.",
    )
    capacity = property(lambda self: self._store.capacity, doc="Slots of each head.")
    most_entries = property(lambda self: self._store.max_count, doc="Entries that no head exceeds; asks no device.")
    decodes = property(
        lambda self: self._layer.engine.step.tokens == 1, doc="Whether this step brings one column, the last there is."
    )
    window = property(lambda self: self._layer.window, doc="Columns that a query may read; None: all.")
    sharded = property(
        lambda self: self._layer.engine.parallel is not None, doc="Whether other ranks hold heads of this layer."
    )

    @property
    def prompt_span(self) -> tuple[Tensor, Tensor]:
        """Positions [first, end) of the prompt's tokens that this forward brings, both [rows] int32 on the CPU.

        Drafts that come with the prompt given to ``generate`` are behind the end.
        """
        engine = self._layer.engine
        assert engine.step is not None
        step = engine.step.whole or engine.step
        prompt = (engine.prompt_columns or 0) - step.start
        if engine.recording and 0 < prompt < step.tokens:
            return step.before, step.before + (step.positions[:, :prompt] >= 0).sum(1, dtype=torch.int32)
        return step.before, step.after

    def of_layer(self, index: int) -> LayerView:
        """The view of another layer of the same cache, which has run already."""
        return LayerView(self._layer.engine.layers[index])

    @property
    def output_projection(self) -> Tensor:
        """What brings the values of the query heads here into the hidden state, [query_heads * Dv, hidden], the query
        heads of a kv head one after the other. Only for a policy that ``needs_output_projection``."""
        projections = self._layer.engine.projections
        if projections is None:
            raise ValueError(f"{self._layer.engine.policy} does not say needs_output_projection")
        return projections.of(self.index)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token costs in all layers, heads and rows."""
        stores = [x.store for x in self._layer.engine.layers if x.store is not None]
        return self.rows * sum(s.heads * s.storage.token_bytes for s in stores)

    @property
    def hidden(self) -> Tensor:
        """While new tokens are stored, under a policy that ``needs_hidden``: what entered the layer's attention module
        with them, [rows, T, size] in the model's dtype."""
        hidden = self._layer.hidden
        if hidden is None:
            raise RuntimeError(
                f"layer {self.index}: hidden states are shown to policies that need them, in append_columns"
            )
        return hidden

    def column(self, name: str) -> Tensor:
        """A declared side column, [rows, heads, capacity] float32."""
        return self._store.columns[self._store.column_names.index(name)]

    def keys(self) -> Tensor:
        """Dense copy of the keys by slot, [rows, heads, max count, Dk]; as rotated by the model; dead slots are 0."""
        engine, store = self._layer.engine, self._store
        keys = store.gather("keys")
        if not engine.unrotated:
            return keys
        assert engine.rotation is not None
        return engine.rotation.rotate(keys, store.positions[..., : keys.shape[2]])

    def values(self) -> Tensor:
        """Dense copy of the values by slot, [rows, heads, max count, Dv]; dead slots are 0."""
        return self._store.gather("values")

    def values_at(self, slots: Tensor) -> Tensor:
        """Values, float32 [rows, heads, m, Dv], of the entries at ``slots`` [rows, heads, m] int64; -1: of any."""
        return self._store.at("values", slots.clamp(min=0)).float()

    def plain_keys_at(self, slots: Tensor) -> Tensor:
        """Keys without their rotation, float32 [rows, heads, m, Dk], likewise; for policies that merge keys."""
        slots, engine = slots.clamp(min=0), self._layer.engine
        keys = self._store.at("keys", slots).float()
        if engine.unrotated:
            return keys
        assert engine.rotation is not None
        return engine.rotation.unrotate(keys, self._store.positions.gather(2, slots))

    def entries_before(self, end: Tensor) -> Tensor:
        """How many entries lie at positions below ``end`` [rows] int32, where nothing was evicted; [rows] int32."""
        s = self._store
        counts = s.counts[:, 0]
        if not self._layer.engine.policy.schedules:
            return torch.minimum(counts, end)
        # Tokens that skipped the layer left no entry: positions have holes.
        return (s.live[:, 0] & (s.positions[:, 0] < end[:, None])).sum(1, dtype=torch.int32)

    def count(self, event: str, times: int = 1) -> None:
        """Add to an event counter that ``cache.report()`` shows."""
        self._layer.count(event, times)

    def without_rotation(self, queries: Tensor, positions: Tensor) -> Tensor:
        """``queries`` [rows, query_heads, T, D] with the rotation to their ``positions`` [rows, T] taken off.

        What queries of different steps must be compared by. As they are, if the model has no rotation, none that is
        known, or the policy votes with queries at fixed places (compact positions).
        """
        engine = self._layer.engine
        if engine.compact or engine.rotation is None:
            return queries
        step = engine.step
        if step is None or positions is not step.on(positions.device, step.positions):
            return engine.rotation.unrotate(queries, positions)
        angles = self._angles(positions.device)
        assert angles is not None
        return engine.rotation.turn(queries, *angles)

    def turned_back(self, keys: Tensor, positions: Tensor) -> Tensor:
        """``keys`` [rows, heads, n, D] by the transpose of the mean rotation to ``positions`` [rows, T].

        k . (R q) = (R^T k) . q: what queries that are not rotated meet, on the average over these positions. As they
        are, if the model has no rotation.
        """
        rotation = self._layer.engine.rotation
        if rotation is None:
            return keys
        cos, sin = (x.mean(2, keepdim=True) for x in rotation.angles(positions, -1.0))
        return rotation.turn(keys, cos, sin)

    def _angles(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """What turns this step's queries back, [rows, 1, T, half] each; None where there is nothing to turn."""
        engine = self._layer.engine
        if engine.compact or engine.rotation is None:
            return None
        step = engine.step
        assert step is not None
        if device not in step.angles:  # the same for all layers there
            step.angles[device] = engine.rotation.angles(step.on(device, step.positions), -1.0)
        return step.angles[device]

    def _single_angles(self, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """:meth:`_angles` of a step of one query per row, [rows, half] each; cut once for all layers."""
        angles, step = self._angles(device), self._layer.engine.step
        if angles is None or step is None:
            return None, None
        if device not in step.single_angles:
            cos, sin = angles
            step.single_angles[device] = cos[:, 0, 0], sin[:, 0, 0]
        return step.single_angles[device]

    def select_tokens(
        self,
        query: Tensor,
        positions: Tensor,
        state: dict[str, Any],
        *,
        sinks: int,
        k: int,
        local: int,
        reuse: float,
        soft: bool,
        shortlist: int,
    ) -> Selection:
        """One decode step of a selection that is cached, in place in ``state`` and without asking the device:
        :func:`kvcache.ops.reference.select_tokens`, which says what ``state`` holds.

        ``query`` [rows, query_heads, Dk] as the model rotated it, at this step's ``positions`` [rows] int32 (-1: the
        row has none). ``shortlist``: pages that may be looked at, 0 for all.
        """
        s, layer = self._store, self._layer
        if layer.events is None:
            layer.events = torch.zeros(len(EVENTS), dtype=torch.int32, device=query.device)
        cos, sin = self._single_angles(query.device)
        ops.select_tokens(
            query, s.storage.k_pages, s.table, s.counts, s.positions, positions, cos, sin,
            s.storage.bounds if shortlist else None, state["query"], state["index"], state["counts"], state["until"],
            state["at"], layer.events, sinks, k, local, reuse, 1.0, soft, shortlist,
        )  # fmt: skip
        return Selection(state["index"], state["counts"])

    def vote(self, query: Tensor, first: Tensor, end: Tensor, *, soft: bool = True, scale: float = 1.0) -> Tensor:
        """Votes [rows, 1, capacity] of the query heads of ``query`` [rows, query_heads, Dk]: ops.selection_scores."""
        return self._vote(query, self._store.counts, first, end, soft, scale)

    def _vote(self, query: Tensor, counts: Tensor, first: Tensor, end: Tensor, soft: bool, scale: float) -> Tensor:
        s = self._store
        return self.over_heads(
            ops.selection_scores(query, s.storage.k_pages, s.table, counts, s.positions, first, end, scale, soft, False)
        )

    def choose(
        self,
        query: Tensor,
        k: int,
        first: Tensor,
        last: Tensor,
        end: Tensor,
        width: int,
        *,
        vote: str = "soft",
        pool: int = 1,
        shortlist: int = 0,
    ) -> Selection:
        """The ``k`` entries at positions [first, last) that the heads of ``query`` [rows, query_heads, Dk] vote for,
        all before ``first`` and all in [last, end).

        ``vote``: "soft" or "raw" (ops.selection_scores), or "head": every query head has one vote for each of the k
        entries with its largest logits. ``pool``: of the votes of so many neighbours, the entry in the middle, the
        largest counts. ``shortlist``: pages that may be looked at, 0 for all; not with "head" or a pool.
        """
        s, soft = self._store, vote == "soft"
        before = self.entries_before(end)[:, None]
        best = torch.full((len(end), 1), k, dtype=torch.int32, device=end.device)
        # Later entries, of a prompt that is there as a whole, are neither candidates nor read.
        counts = before.expand(-1, self.heads).contiguous()
        if not shortlist:
            if vote == "head":
                scores = self._votes_of_heads(query, k, counts, first, last)
            else:
                scores = self._vote(query, counts, first, last, soft, 1.0)
            if pool > 1:
                largest = torch.nn.functional.max_pool1d(scores, pool, 1, pool // 2)
                scores = torch.where(scores > float("-inf"), largest, scores)
            return Selection(*ops.topk(scores, before, s.positions[:, :1], best, first, last, width))
        assert s.storage.bounds is not None
        parallel = self._layer.engine.parallel
        return Selection(
            *two_stage_selection(
                query, s.storage.k_pages, s.storage.bounds, s.table, counts, s.positions, first, last, 1.0, best,
                shortlist, soft=soft, width=width, total=None if parallel is None else self.over_heads,
            )
        )  # fmt: skip

    def _votes_of_heads(self, query: Tensor, k: int, counts: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """How many query heads have an entry among their ``k`` best candidates: [rows, 1, capacity] float32."""
        s = self._store
        votes = torch.zeros(self.rows, 1, self.capacity, device=query.device)
        heads = query.view(self.rows, self.heads, self.group, -1)
        for g in range(self.group):  # one query head of every kv head at a time: their logits one by one
            one = heads[:, :, g].contiguous()
            logits = ops.selection_scores(
                one, s.storage.k_pages, s.table, counts, s.positions, first, end, 1.0, False, True
            )
            best, slots = (x[..., :k] for x in logits.sort(dim=2, descending=True, stable=True))
            votes.scatter_add_(2, slots.flatten(1)[:, None], (best > float("-inf")).float().flatten(1)[:, None])
        total = self.over_heads(votes)
        return total.masked_fill(logits[:, :1] == float("-inf"), float("-inf"))

    def choose_pages(self, query: Tensor, pages: int, newest: Tensor) -> Selection:
        """For every kv head the ``pages`` pages whose keys may have the largest dot products with its query heads of
        ``query`` [rows, query_heads, Dk], by the sum of their bounds; the page of position ``newest`` [rows] int32 in
        any case, and nothing behind that. Needs ``page_bounds``; asks no device."""
        s = self._store
        assert s.storage.bounds is not None
        held = self.entries_before(newest + 1)[:, None].expand(-1, self.heads).contiguous()
        none = torch.zeros_like(newest)
        scores = ops.page_scores(
            query, s.storage.bounds, s.table, held, s.positions, none, newest, 1.0, soft=False, per_head=True
        )
        return Selection(*best_pages(scores, held, s.storage.page_size, min(pages, s.table.shape[2])), pages=True)

    def over_heads(self, x: Tensor) -> Tensor:
        """A sum over the heads here as the sum over all: tensor-parallel ranks add theirs."""
        parallel = self._layer.engine.parallel
        return x if parallel is None else parallel.sum(x)

    def all_heads_of(self, x: Tensor, fill: float) -> Tensor:
        """``x`` [rows, heads, n] of the heads on all ranks, [rows, all heads, n or more]; what is added is ``fill``."""
        parallel = self._layer.engine.parallel
        return x if parallel is None else parallel.gather(x, fill)

    def own_heads_of(self, x: Tensor) -> Tensor:
        """Of ``x`` [rows, all heads, ...] the heads here."""
        parallel = self._layer.engine.parallel
        return x if parallel is None else parallel.own(x)

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Cosine [rows] float32 of ``a`` and ``b`` [rows, query_heads, D], over all heads at once."""
        a, b = a.flatten(1).float(), b.flatten(1).float()
        if self._layer.engine.parallel is None:
            return torch.cosine_similarity(a, b, dim=1)
        ab, aa, bb = self.over_heads(torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)]))
        return ab / (aa * bb).sqrt().clamp(min=1e-8)
