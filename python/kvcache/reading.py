"""How a layer's step reads: dense attention over a new prompt, decode, selected chunks, compact positions, latents, and
the statistics that go with each. One half of :class:`kvcache.engine.Engine`, which owns the order of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from .dense_attention import dense_attention, fast_types
from .layer_state import Layer, ObservedQueries, RecordedQueries
from .policies.base import Policy
from .policies.budget import FAR
from .step import Attention, Counted, Narrow, Pages, Step

if TYPE_CHECKING:
    from .parallel import TensorParallel
    from .rotation import Rotation

KV = ("keys", "values")


class Scouted(Exception):
    """Ends a forward that was to find out which tokens of a prompt to read: ``runs`` bool [rows of the model, T]."""

    def __init__(self, runs: Tensor) -> None:
        super().__init__("the tokens that a prompt is read with are known")
        self.runs = runs


class Reading:
    """Attention of the layers of one cache; the attributes are the engine's."""

    policy: Policy
    layers: list[Layer]
    step: Step | None
    kv_dtype: torch.dtype | None
    rotation: Rotation | None
    parallel: TensorParallel | None
    compact: bool
    by_index: bool
    recording: bool
    scouting: bool
    prefill: str
    prompt_length: int | None
    unplanned: bool

    def attend(self, layer: Layer, q: Tensor, ask: Attention, dense: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention output [R, T, Hq, Dv] of q [R, Hq, T, D] over the layer's entries, new ones included.

        ``dense``: keys and values of all entries in slot order as the model transformed them after the append
        (materialised layers); without it the layer's pages are read.
        """
        step = self.step
        assert step is not None
        new = layer.new
        out = self._read(layer, q, ask, dense, step)
        if self.policy.observes and (step.prompt or self.policy.observes_generated):
            layer.scale = ask.scale
            self._observe(layer, q if step.repeats is None else step.repeats.once(q), step)
        if step.prompt and layer.index in self.policy.routes_after and step.tokens > 1:
            assert new is not None
            keys = new[0]
            if step.repeats is not None:
                q, keys = step.repeats.once(q), step.repeats.once(keys)
            self._route_on(layer, q, keys, step)
        return out

    def _route_on(self, layer: Layer, q: Tensor, keys: Tensor, step: Step) -> None:
        """Ask the policy which tokens run the layers behind this one."""
        kept = self.policy.route(layer.view(), q, keys, step.on(q.device, step.positions))
        real = step.positions >= 0
        runs = real if kept is None else kept.cpu() & real
        if self.scouting:
            raise Scouted(runs if step.repeats is None else step.repeats.spread(runs))
        if not torch.equal(runs, real):
            step.narrow = Narrow.of(step, runs)

    def _observe(self, layer: Layer, q: Tensor, step: Step) -> None:
        """Show the policy the step's queries, or note them while it is open which will be accepted."""
        positions, active = step.on(q.device, step.positions), step.routed.get(layer.index)
        if active is not None:
            positions = torch.where(step.on(q.device, active), positions, -1)
        if self.recording:
            layer.pending.append(ObservedQueries(q, positions))
        else:
            self.policy.observe(layer.view(), q, positions)

    def _read(self, layer: Layer, q: Tensor, ask: Attention, dense: tuple[Tensor, Tensor] | None, step: Step) -> Tensor:
        if step.ready and dense is None and ask.mask is None:
            assert layer.store is not None
            layer.new = None  # not kept: they are in the pages
            layer.group = q.shape[1] // layer.store.heads
            window = layer.window
            start = None if window is None else step.on(q.device, step.decode_start(window))
            selecting = self._selects(layer, step)
            positions = step.on(q.device, step.positions)
            return self._decode(layer, Pages.of(layer.store), q, positions, start, ask, selecting)
        repeats = step.repeats
        if repeats is None:
            return self._attend(layer, q, ask, dense)
        if layer.new is not None:
            layer.new = (repeats.once(layer.new[0]), repeats.once(layer.new[1]))
        if ask.mask is not None and ask.mask.shape[0] > 1:
            ask = replace(ask, mask=repeats.once(ask.mask))
        if dense is not None:
            dense = (repeats.once(dense[0]), repeats.once(dense[1]))
        return repeats.spread(self._attend(layer, repeats.once(q), ask, dense))

    def _selects(self, layer: Layer, step: Step) -> bool:
        """Whether the policy chooses what this step reads of ``layer``; one with a sliding window reads its window."""
        policy = self.policy
        return policy.selects and layer.window is None and (not step.prompt or policy.selects_in_prompts)

    def _attend(self, layer: Layer, q: Tensor, ask: Attention, dense: tuple[Tensor, Tensor] | None) -> Tensor:
        step, store = self.step, layer.store
        assert step is not None
        assert store is not None
        new, layer.new = layer.new, None  # not kept: they are in the pages
        if store.max_count == 0:  # a chunk of nothing but padding
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], store.storage.v_pages.shape[2])
        pages = Pages.of(store) if dense is None else Pages.dense(*dense, store.counts, store.positions)
        layer.group = q.shape[1] // pages.counts.shape[1]
        active = step.routed.get(layer.index)
        positions, reach = (step.on(q.device, x) for x in (step.positions, step.reach))
        if active is not None:
            active = step.on(q.device, active)
            positions, reach = torch.where(active, positions, -1), torch.where(active, reach, -1)
        selecting = self._selects(layer, step)
        if self.compact:
            return self._attend_compact(layer, q, positions, reach, ask, selecting)
        if self.by_index:
            alone = new is not None and step.tokens > 1 and self._is_plain(layer, step, ask, new[0])
            if not alone:  # else the first tokens are where they would be
                pages, q = self.indexed(layer), self._by_index(layer, q, reach)
        mask = self._slot_mask(step, pages, ask.mask)
        if mask is None and self._decodes(layer):
            first = None if layer.window is None else step.on(q.device, step.decode_start(layer.window))
            return self._decode(layer, pages, q, positions, first, ask, selecting)
        start = None if layer.window is None else step.on(q.device, step.window_start(layer.window))
        if selecting:
            return self._prefill_selected(layer, pages, q, positions, reach, ask)
        if new is not None and self._is_plain(layer, step, ask, new[0]):
            return dense_attention(q, *new, ask.scale).transpose(1, 2)
        out, lse = ops.prefill_attention(
            q, pages.k, pages.v, pages.table, pages.counts, pages.positions, reach, start, ask.sinks, None, mask,
            None, None, ask.scale, ask.softcap,
        )  # fmt: skip
        counted = step.counted
        if counted is not None and self.recording:
            layer.pending.append(RecordedQueries(q, positions, lse, start, mask, ask, counted))
        elif counted is not None:
            self._collect(layer, pages, q, positions, lse, start, mask, ask, counted)
        return out

    # -- latents (mla.py) -------------------------------------------------------------------------------------------

    def dense_slots(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Keys and values of ``layer`` in slot order, [R, H, n, D], for every row of the model."""
        assert self.step is not None
        assert layer.store is not None
        k, v = layer.store.gather("keys"), layer.store.gather("values")
        repeats = self.step.repeats
        return (k, v) if repeats is None else (repeats.spread(k), repeats.spread(v))

    def _decodes(self, layer: Layer) -> bool:
        """Whether this step brings one real token per row, which all run the layer and is known to stay."""
        step = self.step
        assert step is not None
        return step.tokens == 1 and layer.index not in step.routed and not step.padded and not self.recording

    def takes_latents(self, layer: Layer, ask: Attention) -> bool:
        """Whether :meth:`read_latents` can answer this step: causal attention, its statistics those of one token."""
        assert self.step is not None
        return ask.mask is None and ask.sinks is None and (self.step.counted is None or self._decodes(layer))

    def attend_latents(self, layer: Layer, q: Tensor, ask: Attention, absorbed: Callable[..., Tensor]) -> Tensor:
        """``absorbed(q, ask)`` -> [R, T, Hq, Dv] for the rows of q [R, Hq, T, D] that differ, spread over all rows."""
        assert self.step is not None
        repeats = self.step.repeats
        return absorbed(q, ask) if repeats is None else repeats.spread(absorbed(repeats.once(q), ask))

    def read_latents(self, layer: Layer, q_latent: Tensor, q_rope: Tensor, ask: Attention) -> Tensor:
        """Weighted latents [R, T, Hq, L] of q_latent [R, Hq, T, L], q_rope [R, Hq, T, P] over the layer's entries."""
        step, store, policy = self.step, layer.store, self.policy
        assert step is not None
        assert store is not None
        layer.group = 1  # as where entries are expanded: every query head has its own keys
        device, storage = q_latent.device, store.storage
        one, reach = self._decodes(layer), None
        if not one:
            reach, active = step.on(device, step.reach), step.routed.get(layer.index)
            reach = reach if active is None else torch.where(step.on(device, active), reach, -1)
        start = None if layer.window is None else step.on(device, step.window_start(layer.window))
        counted = step.counted
        out, _ = ops.latent_attention(
            q_latent, q_rope, storage.k_pages, storage.v_pages, store.table, store.counts, store.positions, reach,
            start, None if counted is None else store.columns[0], ask.scale, ask.softcap,
            1.0 if counted is None else counted.keep,
            policy.group_reduction == "max", self._decode_plan(layer) if one else None,
        )  # fmt: skip
        return out

    def _is_plain(self, layer: Layer, step: Step, ask: Attention, keys: Tensor) -> bool:
        """Whether torch's dense causal attention over the new tokens alone is the answer, and the faster way to it."""
        dtype = keys.dtype
        return (
            layer.was_empty
            and dtype in fast_types(keys.device.type)
            and not self.policy.needs
            and not step.padded
            and layer.index not in step.routed
            and ask.mask is None
            and ask.sinks is None
            and ask.softcap == 0.0
            and (layer.window is None or (step.tokens <= layer.window and step.whole is None))
            and (self.kv_dtype is None or self.kv_dtype == dtype)
        )

    def _decode(
        self,
        layer: Layer,
        pages: Pages,
        q: Tensor,
        positions: Tensor,
        start: Tensor | None,
        ask: Attention,
        selecting: bool,
    ) -> Tensor:
        selection = self.policy.select(layer.view(), q, positions) if selecting else None
        policy, statistics = self.policy, None
        assert self.step is not None
        assert layer.store is not None
        counted = self.step.counted
        keep = 1.0 if counted is None else counted.keep
        # Materialised layers may attend with more heads, in other slots, than they store: collected aside, then added.
        aside = pages.k is not layer.store.storage.k_pages
        if counted is not None:
            statistics = torch.zeros(pages.positions.shape, device=q.device) if aside else layer.store.columns[0]
        out, _ = ops.decode_attention(
            q[:, :, 0], pages.k, pages.v, pages.table, pages.counts, pages.positions,
            start, ask.sinks, None,
            None if selection is None else selection.index, None if selection is None else selection.counts,
            statistics, ask.scale, ask.softcap, keep, policy.group_reduction == "max",
            selection is not None and selection.pages,
            None if aside or selection is not None else self._decode_plan(layer),
        )  # fmt: skip
        if statistics is not None and aside:
            self._add_scores(layer, statistics, keep)
        return out[:, None]

    def _decode_plan(self, layer: Layer) -> Tensor | None:
        """The layer's part of a plan that is made once per step for all layers alike; None on a CPU."""
        step, store = self.step, layer.store
        assert step is not None
        assert store is not None
        if not store.mirrored:
            return None
        if layer.index not in step.plans:
            alike = [
                x
                for x in self.layers
                if x.store is not None
                and x.store.counts.shape == store.counts.shape
                and x.store.counts.device == store.counts.device
            ]
            counts = torch.stack([x.store.counts for x in alike if x.store is not None])
            # A bound that stays while the memory does, for captured graphs.
            most = max(x.store.capacity for x in alike if x.store is not None)
            # Layers that have not appended yet gain one entry; for the others the plan is one too long: harmless.
            plans = ops.plan_decode(counts, added=1, most=most)
            step.plans.update((x.index, plans[i]) for i, x in enumerate(alike))
        return step.plans[layer.index]

    def _chunks(
        self, q: Tensor, positions: Tensor, reach: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
        """Queries in the chunks that a selecting policy wants: (q, positions to select for, reach) each.

        Cut by position, real queries first, so that padding moves no boundary; also the order that did it, or None.
        """
        order = None
        if bool((positions < 0).any()):
            order = torch.argsort(positions < 0, dim=1, stable=True)
            q = q.gather(2, order[:, None, :, None].expand(q.shape))
            positions, reach = positions.gather(1, order), reach.gather(1, order)
        chunk = self.policy.prefill_chunk or q.shape[2]
        parts = []
        for a in range(0, q.shape[2], chunk):
            piece = slice(a, a + chunk)
            parts.append((q[:, :, piece], positions[:, piece].contiguous(), reach[:, piece].contiguous()))
        return parts, order

    @staticmethod
    def _join(outs: list[Tensor], order: Tensor | None) -> Tensor:
        out = torch.cat(outs, 1)
        if order is None:
            return out
        return torch.empty_like(out).scatter_(1, order[:, :, None, None].expand(out.shape), out)

    def _prefill_selected(
        self, layer: Layer, pages: Pages, q: Tensor, positions: Tensor, reach: Tensor, ask: Attention
    ) -> Tensor:
        """Many queries under a selecting policy, chunk by chunk."""
        parts, order = self._chunks(q, positions, reach)
        outs = []
        for part, voting, limit in parts:
            selection = self.policy.select(layer.view(), part, voting)
            if selection is not None:
                selection = selection.slots(pages.k.shape[1], pages.counts)
            out, _ = ops.prefill_attention(
                part, pages.k, pages.v, pages.table, pages.counts, pages.positions, limit, None, ask.sinks, None,
                None, None if selection is None else selection.index,
                None if selection is None else selection.counts, ask.scale, ask.softcap,
            )  # fmt: skip
            outs.append(out)
        return self._join(outs, order)

    def _attend_compact(
        self, layer: Layer, q: Tensor, positions: Tensor, reach: Tensor, ask: Attention, selecting: bool
    ) -> Tensor:
        """Attention with clipped compact positions: entries and queries are rotated by their place in the list.

        Source: TokenSelect, arXiv 2411.02886, section 4.3; official code patcher/token_retrieval.py.
        """
        rotation, store = self.rotation, layer.store
        assert rotation is not None
        assert store is not None
        if ask.mask is not None:
            raise ValueError("positions='compact' works with causal attention only, but the model passes a mask")
        parts, order = self._chunks(rotation.unrotate(q, positions.clamp(min=0)), positions, reach)
        outs = []
        for part, voting, limit in parts:
            rows, tokens = limit.shape
            selection = None
            if selecting:
                place = torch.arange(tokens, dtype=torch.int32, device=q.device).expand(rows, -1)
                place = place + self.policy.query_place
                selection = self.policy.select(layer.view(), rotation.rotate(part, place), voting)
                if selection is not None:
                    selection = selection.slots(store.storage.page_size, store.counts)
                    if selection.index.shape[1] > 1:
                        raise ValueError(f"{self.policy}: positions='compact' needs one list for all kv heads")
            end = limit.amax(1) + 1
            if selection is None:
                counts = layer.view().entries_before(end)[:, None]
                index = torch.arange(int(counts.max()), dtype=torch.int32, device=q.device).expand(rows, 1, -1)
            else:
                counts = selection.counts
                index = selection.index[..., : int(counts.max())]
            if index.shape[2] == 0:  # padding before every row's first token
                outs.append(part.new_zeros(rows, tokens, part.shape[1], store.storage.v_pages.shape[2]))
                continue
            slots = index.clamp(min=0).long()[..., None].expand(-1, store.heads, -1, -1)
            keys, values = (x.gather(2, slots.expand(*slots.shape[:3], x.shape[3])) for x in map(store.gather, KV))
            place = torch.arange(index.shape[2], dtype=torch.int32, device=q.device).expand(rows, -1)
            listed = Pages.dense(
                rotation.rotate(keys, place),
                values,
                counts.expand(-1, store.heads),
                place[:, None].expand(-1, store.heads, -1),
            )
            # The list ends with the newest token, so a query's place is counted from its end.
            place = torch.where(limit >= 0, limit - end[:, None] + counts, -1).contiguous()
            out, _ = ops.prefill_attention(
                rotation.rotate(part, place.clamp(min=0)), listed.k, listed.v, listed.table, listed.counts,
                listed.positions, place, None, ask.sinks, None, None, None, None, ask.scale, ask.softcap,
            )  # fmt: skip
            outs.append(out)
        return self._join(outs, order)

    def indexed(self, layer: Layer) -> Pages:
        """The entries of ``layer``, keys rotated by their place in their head: 0, 1, ... in the order of positions."""
        store, rotation = layer.store, self.rotation
        assert store is not None
        assert rotation is not None
        keys, values = map(store.gather, KV)
        positions = store.positions[..., : keys.shape[2]]
        order = self._in_order(layer).indices
        index = torch.arange(keys.shape[2], device=keys.device).expand(order.shape)
        place = torch.empty_like(order).scatter_(2, order, index)
        return Pages.dense(rotation.rotate(keys, place), values, store.counts, positions)

    def _by_index(self, layer: Layer, q: Tensor, reach: Tensor) -> Tensor:
        """q [R, Hq, T, D] turned from the positions ``reach`` [R, T] to the place of that entry in each head."""
        store, rotation = layer.store, self.rotation
        assert store is not None
        assert rotation is not None
        wanted = reach[:, None].expand(-1, store.heads, -1).contiguous()
        place = torch.searchsorted(self._in_order(layer).values.contiguous(), wanted, right=True) - 1
        return rotation.rotate(q, (place - wanted).repeat_interleave(layer.group, 1))

    @staticmethod
    def _in_order(layer: Layer) -> torch.return_types.sort:
        """Positions [R, H, n] of the entries of every head, ascending, and their slots; behind them what is far."""
        store = layer.store
        assert store is not None
        live = torch.arange(store.max_count, device=store.counts.device) < store.counts[..., None]
        return torch.where(live, store.positions[..., : store.max_count], FAR).sort(dim=2)

    def _slot_mask(self, step: Step, pages: Pages, mask: Tensor | None) -> Tensor | None:
        """A mask over seen columns [R, m, T, columns] as one over slots [R, m | heads, T, capacity]."""
        if mask is None:
            return None
        columns = step.column_of(pages.positions).clamp(0, mask.shape[-1] - 1)  # [R, H, C]
        wide = mask.expand(pages.counts.shape[0], pages.counts.shape[1], -1, -1)
        return wide.gather(3, columns[:, :, None].expand(-1, -1, mask.shape[2], -1)).contiguous()

    # -- statistics -------------------------------------------------------------------------------------------------

    def _counted(self, step: Step) -> Counted | None:
        """Which queries of ``step`` the policy's statistic counts; None: none of them."""
        needs = self.policy.needs
        if "attention_sums" in needs:
            return Counted(0, 1.0)
        if "last_attention" in needs:
            return Counted(1, 0.0)
        if "window_attention" not in needs or not step.prompt:
            return None
        window, length = self.policy.observed, self.prompt_length
        coming = 0 if length is None else max(length - step.start - step.tokens, 0)
        if length is None or self.recording or self.prefill == "chunked":
            return Counted(window, 0.0)
        # Before the first chunk whose queries belong to the window, others stand in: rows that are padded on the right
        # may have ended. A row without queries in the first chunk is padded on the left: nothing old may stay there.
        idle = 1.0 if self.unplanned or not coming else 0.0
        if coming >= window:
            return Counted(window, 0.0, idle)
        # The window may begin in an earlier chunk of this prompt, which has counted its part of it then.
        begun = self.unplanned and length - step.start < window
        return Counted(window - coming, 1.0 if begun else 0.0, idle)

    def _collect(
        self,
        layer: Layer,
        pages: Pages,
        q: Tensor,
        positions: Tensor,
        lse: Tensor,
        start: Tensor | None,
        mask: Tensor | None,
        ask: Attention,
        counted: Counted,
    ) -> None:
        """Bring the attention mass of many queries into the score column."""
        sums = ops.column_sums(
            q, pages.k, pages.table, pages.counts, pages.positions, positions, lse, start, None, mask, ask.scale,
            ask.softcap, counted.last, self.policy.group_reduction == "max",
        )  # fmt: skip
        self._add_scores(layer, sums, counted.keep_of((positions >= 0).any(1)))

    def _add_scores(self, layer: Layer, sums: Tensor, keep: float | Tensor) -> None:
        store = layer.store
        assert store is not None
        rows, heads, width = sums.shape
        sums = sums.view(rows, store.heads, heads // store.heads, width)
        sums = sums.amax(2) if self.policy.group_reduction == "max" else sums.mean(2)
        scores = store.columns[0][..., :width]
        scores.copy_(scores * keep + sums)
