"""When entries leave: budgets at the end of a prompt, then eviction after every forward. A part of
:class:`kvcache.engine.Engine`, which owns the order of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .layer_state import Layer
from .policies.base import Policy
from .policies.budget import FAR

if TYPE_CHECKING:
    from .parallel import TensorParallel
    from .rotation import Rotation
    from .step import Step
    from .store import PageStorage


class Evicting:
    """Budgets and eviction of the layers of one cache; the attributes are the engine's."""

    policy: Policy
    layers: list[Layer]
    storages: dict[tuple, PageStorage]
    page_size: int
    seen: int
    tokens: Tensor
    prompt_tokens: Tensor
    real: Tensor | None
    unplanned: bool
    parallel: TensorParallel | None
    unrotated: bool
    rotation: Rotation | None
    _tokens_on: dict[torch.device, tuple[Tensor, Tensor]]

    def tokens_on(self, device: torch.device) -> Tensor:
        """Real tokens of each row, [R] int32, where a layer needs them; carried over once for all layers."""
        if self.tokens.device == device:
            return self.tokens
        known = self._tokens_on.get(device)
        if known is None or known[0] is not self.tokens:
            known = self._tokens_on[device] = (self.tokens, self.tokens.to(device))
        return known[1]

    def holding(self) -> list[Layer]:
        """The layers that hold rows here."""
        return [x for x in self.layers if x.store is not None and x.store.counts_host.size]

    def settle(self, step: Step | None = None) -> None:
        """Fix the budgets if a prompt ended, then bring every layer within them.

        ``step``: the forward that this ends, if any. Where a captured graph has evicted already, only the host is told.
        """
        evicted = None if step is None else step.evicted
        plan = self.unplanned
        slack = 0 if plan else self.policy.slack  # a prompt ends within its budget
        due: Tensor | None = None
        if plan:
            self.unplanned = False
            self.prompt_tokens = self.tokens
            self.plan(self.holding())
        else:
            for layer in self.holding():
                if layer.budgets is None:
                    self.plan([layer], prompt=False)
            if self.policy.reallocates and (due := self._rows_due(slack)) is not None:
                self.plan(self.holding(), rows=due)
                slack = 0
        single: list[Layer] = []
        for layer in self.holding():
            store = layer.store
            assert store is not None
            if store.max_count <= layer.smallest_budget + slack:
                continue
            over = layer.excess()
            if over <= slack:
                continue
            foreseen = evicted is not None or (layer.surely_evicts and not store.shared)
            if over == 1 and due is None and foreseen and not self.merges_in(layer):
                single.append(layer)
            else:
                self.evict(layer, step, slack, due)
        if single:
            over_by_one = [x.heads_over() for x in single]
            if evicted is None:
                self.evict_one(single, step)
            for layer, lost in zip(single, over_by_one):
                assert layer.store is not None
                layer.store.lost(lost)
                layer.count("evictions", layer.store.counts_host.size if lost is None else int(np.count_nonzero(lost)))
        if plan and self.policy.retains and self.policy.generated == "keep":
            self.plan(self.holding(), prompt=False)
        if plan:
            for storage in self.storages.values():
                storage.trim(self.policy.slack)

    def plan(self, layers: list[Layer], prompt: bool = True, rows: Tensor | None = None) -> None:
        """Fix the budgets of layers: for the end of a ``prompt``, or for the tokens that are generated behind it.

        ``rows`` [R] bool: those whose budgets change; None: all.
        """
        granted: list[Tensor | None] = [None] * len(layers)
        if self.policy.retains and (prompt or self.policy.generated == "evict"):
            granted = [*self.policy.allocate_all([x.view() for x in layers])]
        for layer, given in zip(layers, granted, strict=True):
            store = layer.store
            assert store is not None
            budgets = torch.full((store.rows, store.heads), FAR, dtype=torch.int32)
            recent = torch.zeros(store.rows, dtype=torch.int32)
            if given is not None:
                budgets = given.int().view(store.rows, -1).expand(store.rows, store.heads)
                recent = self.policy.allocate_recent(layer.view()).int()
            if layer.window is not None:
                budgets = budgets.clamp(max=max(layer.window - 1, 1))
            if rows is not None:
                assert layer.budgets is not None
                budgets = torch.where(rows.to(budgets.device)[:, None], budgets, layer.budgets.to(budgets.device))
            layer.set_budgets(budgets, recent)

    def _rows_due(self, slack: int) -> Tensor | None:
        """Rows with a head that is over its budget by more than ``slack`` entries, [R] bool; None: there is none."""
        over = np.zeros(len(self.tokens), bool)
        for layer in self.holding():
            assert layer.store is not None
            if layer.store.max_count > layer.smallest_budget + slack:
                over |= (layer.store.counts_host.astype(np.int64) - layer.budgets_host > slack).any(1)
        due = torch.from_numpy(over)
        if self.parallel is not None:  # heads of other ranks may be over theirs, and all must share out together
            device = next((x.store.counts.device for x in self.holding() if x.store is not None), due.device)
            due = self.parallel.sum(due.to(device, torch.int32)).cpu() > 0
        return due if bool(due.any()) else None

    def merges_in(self, layer: Layer) -> bool:
        """Whether what leaves ``layer`` goes into what stays: not where a window of the model's hides it anyway."""
        return self.policy.merges and layer.window is None

    def _merge(self, layer: Layer, evicted: Tensor) -> None:
        """Let the policy fold the ``evicted`` entries [R, H, C] bool, which are still there, into the others."""
        store = layer.store
        assert store is not None
        kept = store.live & ~evicted
        merged = self.policy.merge(layer.view(), evicted, kept)
        if merged is None or merged.slots.shape[2] == 0:
            return
        slots, keys = merged.slots, merged.keys
        held = slots.clamp(min=0)
        if not bool((kept.gather(2, held) | (slots < 0)).all()):
            raise ValueError(f"{self.policy}: merge() names slots that hold no entry that stays")
        if keys is not None and not self.unrotated:
            assert self.rotation is not None
            keys = self.rotation.rotate(keys, store.positions.gather(2, held))
        store.unshare()
        store.replace(slots, keys, merged.values)

    def compress(self, coming: int) -> None:
        """After a chunk that is not the last: bring every layer within the budgets that the whole prompt will have.

        What is still to come, ``coming`` columns, counts as real tokens (only padding on the right is none); the end of
        the prompt fixes the budgets anew.
        """
        self.prompt_tokens = self.tokens + coming
        self.plan(self.holding())
        for layer in self.holding():
            self.evict(layer)

    def evict_one(self, layers: list[Layer], step: Step | None = None) -> None:
        """Take from every head that is over its budget the entry that its policy gives up first.

        Launches kernels and waits for nothing. The host must know that every such head has a candidate and shares no
        pages, and accounts for what leaves: :meth:`kvcache.store.LayerStore.lost`.
        """
        known: dict[tuple, tuple[Tensor, Tensor]] = {}
        for storage in self.storages.values():
            some = [x for x in layers if x.store is not None and x.store.storage is storage]
            if not some:
                continue
            stores = [x.store for x in some if x.store is not None]
            ranges = [self._unprotected(x, known) for x in some]
            ops.evict(
                storage.k_pages, storage.v_pages, [s.table for s in stores], [s.counts for s in stores],
                [s.positions for s in stores], [s.columns for s in stores], [self._scores(x, step) for x in some],
                [x.budgets for x in some if x.budgets is not None], [r[0] for r in ranges], [r[1] for r in ranges],
                storage.bounds,
            )  # fmt: skip

    def _unprotected(
        self, layer: Layer, known: dict[tuple, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Entries at positions [first, end) of each row, both [R] int32, may leave; ``known`` keeps what was asked."""
        assert layer.store is not None
        assert layer.recent is not None
        key = (layer.recent_key, layer.window is None, layer.recent.device)
        found = None if known is None else known.get(key)
        if found is None:
            tokens = self.tokens_on(layer.store.counts.device)
            first = torch.full_like(tokens, self.policy.sinks if layer.window is None else 0)
            found = first, tokens - layer.recent
            if known is not None:
                known[key] = found
        return found

    def _scores(self, layer: Layer, step: Step | None) -> Tensor | None:
        """Retention scores [R, H, C] float32; None: the oldest entry leaves first."""
        store = layer.store
        assert store is not None
        scores = self.policy.score(layer.view()) if self.policy.retains else None
        if scores is not None and layer.window is not None:
            # What no later query can see must not hold a place in the budget.
            column = self._window_limit(layer.window, store.counts.device, step)
            scores = torch.where(store.positions < column[:, None, None], float("-inf"), scores)
        return scores

    def _window_limit(self, window: int, device: torch.device, step: Step | None) -> Tensor:
        """First position that the query after ``step`` may read in each row, [R] int32."""
        if step is not None and step.ready:
            return step.on(device, step.decode_start(window, ahead=1))
        column = max(self.seen + 1 - window, 0)
        if self.real is None:
            return torch.full_like(self.tokens_on(device), column)
        return self.real[:, :column].sum(1, dtype=torch.int32).to(device)

    def evict(self, layer: Layer, step: Step | None = None, slack: int = 0, rows: Tensor | None = None) -> None:
        """Bring the heads of one layer that are over their budget by more than ``slack`` entries back to it.

        ``rows`` [R] bool: those in which that is done; None: in all.
        """
        store, budgets = layer.store, layer.budgets
        assert store is not None
        assert budgets is not None
        over = layer.excess()
        if over <= slack:
            return
        device = store.counts.device
        if slack:  # what a head keeps does not depend on how far the others are
            budgets = torch.where(store.counts - budgets > slack, budgets, store.counts)
        if rows is not None:
            budgets = torch.where(rows.to(device)[:, None], budgets, store.counts)
        first, end = self._unprotected(layer)
        scores = self._scores(layer, step)
        before = int(store.counts_host.sum())
        if over == 1:
            victims = ops.choose_victims(scores, store.counts, store.positions, budgets, first, end)
            if self.merges_in(layer):
                self._merge(layer, torch.arange(store.capacity, device=device) == victims[..., None])
            store.overwrite(victims)
        else:
            if scores is None:
                scores = store.positions.float()
            live = store.live
            p = store.positions
            protected = (live & ((p < first[:, None, None]) | (p >= end[:, None, None]))).sum(-1, dtype=torch.int32)
            k = (budgets - protected).clamp(min=0)
            width = int(torch.minimum(torch.maximum(budgets, protected), store.counts).max())
            kept = ops.topk(scores.contiguous(), store.counts, p, k, first, end, max(width, 1))
            if self.merges_in(layer):
                stays = torch.nn.functional.pad(torch.zeros_like(live), (0, 1))
                stays.scatter_(2, torch.where(kept[0] < 0, store.capacity, kept[0]).long(), True)
                self._merge(layer, live & ~stays[..., :-1])
            store.keep(*kept, ahead=1 + self.policy.slack)
        layer.count("evictions", before - int(store.counts_host.sum()))

    def pages_to_evict(self, layer: Layer, added: np.ndarray | int, prompt: bool) -> int:
        """Fresh pages, at most, that evicting after ``added`` [R] more entries takes: copies of what others share.

        Counted only where ``max_tokens`` limits the pages: a forward that cannot evict at its end must not begin.
        ``prompt``: the budgets will be fixed anew, nobody knows yet to what.
        """
        store = layer.store
        assert store is not None
        if store.storage.limit is None or not (self.policy.retains or layer.window is not None):
            return 0
        counts = store.counts_host + np.reshape(added, (-1, 1))
        known = layer.budgets is not None and layer.recent is not None and not (prompt or self.policy.reallocates)
        over: Any = counts - layer.budgets_host.astype(np.int64) - self.policy.slack if known else counts
        if not counts.size or over.max() <= 0 or not store.shared:
            return 0
        if known and not self.merges_in(layer):  # what merges copies all of it, to be written to
            assert layer.recent is not None
            if over.max() == 1 and not self.policy.slack:
                return int(np.count_nonzero(over > 0))
            protected = self.policy.sinks + layer.recent.cpu().numpy()[:, None]
            counts = np.where(over > 0, np.minimum(counts, np.maximum(layer.budgets_host, protected)), counts)
        return int((-(-counts // self.page_size)).sum())

    def evictable_in_advance(self, step: Step) -> bool:
        """Whether the end of this forward can be foreseen: no head will be over its budget by more than one entry, each
        that is has something to give up, and no page is shared; where a policy has slack or merges, nothing will be
        evicted."""
        slack = self.policy.slack
        if step.prompt or self.unplanned or (self.policy.reallocates and not slack):
            return False
        for layer in self.layers:
            store = layer.store
            if store is None:
                continue
            if layer.budgets is None or not layer.surely_evicts or store.shared:
                return False
            # The step's own entry, which the counts lack here, may be the one over the budget only without slack.
            bulk = slack or self.merges_in(layer)
            within = slack - 1 if bulk and layer.index not in step.skipped else slack
            if store.max_count - within > layer.smallest_budget and layer.excess() > within:
                return False
        return True
