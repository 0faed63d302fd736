"""The one order of a layer's step: append, select, attend and collect statistics; then, after the last layer, evict.

The engine owns the order and the bookkeeping that must never differ between policies: padding is not stored, seen is
not kept, scores count only accepted queries, evicting happens between forwards. It knows neither transformers nor
the layout of pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._C import OutOfPages
from .evicting import Evicting
from .layer_state import Layer
from .policies.base import Policy
from .policy_state import copied, joined
from .reading import Reading
from .step import Narrow, Repeats, Step, StepInputs
from .store import Added, LayerStore, PageStorage

if TYPE_CHECKING:
    from .parallel import TensorParallel
    from .projection import OutputProjections
    from .rotation import Rotation


class Engine(Reading, Evicting):
    """The layers of one cache and the steps they take together."""

    def __init__(
        self,
        policy: Policy,
        windows: list[int | None],
        *,
        page_size: int,
        kv_dtype: torch.dtype | None,
        max_tokens: int | None,
        rotation: Rotation | None = None,
        projections: OutputProjections | None = None,
        parallel: TensorParallel | None = None,
        prefill: str = "whole",
    ) -> None:
        self.policy = policy
        self.prefill = prefill
        self.page_size, self.kv_dtype, self.max_tokens = page_size, kv_dtype, max_tokens
        self.rotation, self.projections, self.parallel = rotation, projections, parallel
        if "window_attention" in policy.needs and policy.observed < 1:
            raise ValueError(f"{policy}: window_attention needs observed queries, 1 or more, got {policy.observed}")
        self.compact, self.by_index = policy.positions == "compact", policy.positions == "cache"
        self.unrotated = self.compact or self.by_index  # keys are stored so
        if self.unrotated and rotation is None:
            raise ValueError(f"{policy} needs the model's rotation")
        self.layers = [Layer(self, i, w) for i, w in enumerate(windows)]
        self.storages: dict[tuple, PageStorage] = {}
        self.pool_rows: int | None = None  # rows that share the storages, if other engines have rows there too
        self.seen = 0
        self.tokens = torch.zeros(0, dtype=torch.int32)
        self._tokens_on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._inputs: dict[torch.device, StepInputs] = {}
        self.prompt_tokens = torch.zeros(0, dtype=torch.int32)
        self.real: Tensor | None = None
        self.recording = False
        self.scouting = False  # forwards end, with Scouted, where the policy has routed
        self.prompt_length: int | None = None  # columns of a prompt that arrives in chunks
        self.prompt_columns: int | None = None  # of the prompt given to generate(): behind them come drafts
        self.unplanned = False  # a prompt has been read and no budget was fixed since
        self.step: Step | None = None

    # -- begin: everything that can be refused is refused here -----------------------------------------------------

    def begin(self, rows: int, tokens: int, mask: Tensor | None, first: Tensor | None = None) -> None:
        """Open a forward of ``tokens`` new columns. ``mask`` [rows, seen + tokens] bool: which columns are real.

        ``first`` [rows] int64: the first row whose inputs are the same; rows that begin alike (beams, several samples
        of one prompt) are stored, attended and evicted once and share their pages afterwards. None: all differ.

        Raises ValueError for a mask that does not fit and OutOfPages when the tokens cannot be stored; nothing has
        changed then.
        """
        known = len(self.tokens)
        if known and known != rows:
            raise ValueError(f"input_ids has {rows} rows, but the cache holds {known}")
        if tokens == 0:
            raise ValueError("input_ids is empty: a forward needs at least one new token")
        self.check_whole(tokens)
        same = None
        if first is not None and not known and not self.recording:  # what is recorded stays as it came
            same = Repeats.of(first)
        if same is not None:
            rows = len(same.unique)
            mask = None if mask is None else mask[same.unique]
        before = self.tokens if known else torch.zeros(rows, dtype=torch.int32)
        real, new = self._real_columns(rows, tokens, mask)
        if new is None:
            after = before + tokens
            step = torch.arange(tokens, dtype=torch.int32)
            reach = positions = before[:, None] + step
            added: Added = tokens
        else:
            count = new.cumsum(1, dtype=torch.int32)
            after = before + count[:, -1]
            reach = before[:, None] + count - 1
            positions = torch.where(new, reach, -1)
            added = count[:, -1].contiguous().numpy()
        prompt = self.begins_prompt(tokens)
        step_ = Step(self.seen, tokens, rows, positions, reach, before, after, added, real, prompt, same)
        step_.counted = self._counted(step_)
        self._route(step_)
        if self.policy.scout is not None and prompt and tokens > 1 and new is not None:
            step_.narrow = Narrow.of(step_, new)
        self._reserve(step_)
        self._prepare(step_)
        self.step = step_

    def begins_prompt(self, tokens: int) -> bool:
        """Whether a forward of ``tokens`` columns brings a prompt or a part of one."""
        return self.seen == 0 or (tokens > 1 and not self.recording) or self._prompt_left > 0

    def check_whole(self, tokens: int) -> None:
        """ValueError if ``tokens`` columns are a part of a prompt of which the policy needs the whole."""
        if self.policy.routes and self._prompt_left > tokens:
            raise ValueError(
                f"{self.policy} needs the prompt at once, as its last token decides which others are run; got "
                f"{tokens} of the {self._prompt_left} columns to come (leave prefill_chunk_size out)"
            )

    @property
    def _prompt_left(self) -> int:
        return 0 if self.prompt_length is None else self.prompt_length - self.seen

    def _real_columns(self, rows: int, tokens: int, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Real columns [R, seen + T] (None: all) and those of the new tokens [R, T] (None: all)."""
        total = self.seen + tokens
        if mask is not None:
            if mask.shape != (rows, total):
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, but {rows} rows of {self.seen} seen and {tokens} "
                    f"new tokens need ({rows}, {total})"
                )
            past = mask[:, : self.seen]
            same = bool(past.all()) if self.real is None else torch.equal(past, self.real)
            if not same:
                raise ValueError("attention_mask differs from before in columns that are already cached")
            if bool(mask[:, self.seen :].all()):
                mask = None
        if mask is None:
            if self.real is None:
                return None, None
            return torch.nn.functional.pad(self.real, (0, tokens), value=True), None
        return mask, mask[:, self.seen :]

    def _route(self, step: Step) -> None:
        if not self.policy.schedules:
            return
        active = self.policy.layers(len(self.layers), step.reach.clamp(min=0), step.prompt)
        if active is None:
            return
        flat = active.flatten(1)
        for index, (every, some) in enumerate(zip(flat.all(1).tolist(), flat.any(1).tolist())):
            if not every:
                step.routed[index] = active[index]
                if not some:
                    step.skipped.add(index)

    def _added(self, step: Step, layer: Layer) -> Added:
        active = step.routed.get(layer.index)
        return step.added if active is None else (active & (step.positions >= 0)).sum(1, dtype=torch.int32).numpy()

    def _reserve(self, step: Step) -> None:
        """Reserve the pages of the whole forward, or raise."""
        needs: dict[PageStorage, int] = {}
        for layer in self.layers:
            if layer.store is not None:
                storage = layer.store.storage
                added = self._added(step, layer)
                pages = layer.store.pages_needed(added)
                if not self.recording:  # else finish() evicts nothing
                    pages += self.pages_to_evict(layer, added, step.prompt)
                needs[storage] = needs.get(storage, 0) + pages
        for storage, pages in needs.items():
            storage.reserve(pages)
        if self.max_tokens is not None and not needs and step.brings > self.max_tokens:
            raise PromptTooLong(
                f"the prompt has {step.brings} tokens (all rows), more than max_tokens={self.max_tokens}"
            )

    def _prepare(self, step: Step) -> None:
        """Settle on the host what a forward of one token per row will change, so that its layers only launch kernels.

        What cannot be settled in advance goes layer by layer, as prompts do (:meth:`append`).
        """
        if step.tokens != 1 or step.repeats is not None or step.padded:
            return
        if self.recording or self.unrotated:
            return
        running = []
        for layer in self.layers:
            if layer.paged and layer.index not in step.skipped:
                if layer.store is None or layer.index in step.routed:
                    return
                running.append(layer)
        for device in {x.store.counts.device for x in running if x.store is not None and x.store.mirrored}:
            inputs = self._inputs.get(device)
            if inputs is None or inputs.block.shape[1] != step.rows:
                windows = tuple(sorted({x.window for x in self.layers if x.window is not None}))
                inputs = self._inputs[device] = StepInputs(step.rows, windows, device)
            inputs.load(step)
            self._tokens_on[device] = (self.tokens, inputs.before)
        for layer in running:
            assert layer.store is not None
            layer.store.extend(step.added)
            layer.was_empty = False
        self._save(running, step)
        step.ready = True

    def _save(self, layers: list[Layer], step: Step) -> None:
        """Note what :meth:`abort` would need, in memory that is kept from step to step."""
        sources: list[Tensor] = []
        copies: list[Tensor] = []
        for layer in layers:
            # What a policy makes of the queries that it observes it replaces: nothing is written to.
            written = {} if self.policy.observes else layer.state
            now = {k: v for k, v in written.items() if isinstance(v, Tensor)}
            if layer.store is not None and step.counted is not None:
                now["scores"] = layer.store.columns[0]
            for name, tensor in now.items():
                copy = layer.saved.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = layer.saved[name] = torch.empty_like(tensor)
                sources.append(tensor)
                copies.append(copy)
            saved = [(tensor, layer.saved[name]) for name, tensor in now.items()]
            layer.undo = (step.whole or step, dict(layer.state), len(layer.pending), saved)
        if sources:
            torch._foreach_copy_(copies, sources)

    # -- append -----------------------------------------------------------------------------------------------------

    def append(self, layer: Layer, k: Tensor, v: Tensor, step: Step) -> None:
        """Store the new tokens' k [R, H, T, Dk] and v [R, H, T, Dv] in ``layer``."""
        if step.ready and layer.store is not None:
            layer.store.write(k, v, step.on(k.device, step.positions), self._new_columns(layer, k, v))
            layer.hidden = None  # not kept: it is in the columns
            layer.store.grew(step.added)
            step.wrote.append(layer)
            return
        if step.repeats is not None:
            k, v = step.repeats.once(k), step.repeats.once(v)
            layer.hidden = None if layer.hidden is None else step.repeats.once(layer.hidden)
        fresh = layer.store is None  # begin() could not reserve pages for it
        if fresh:
            self._open(layer, k, v)
        store = layer.store
        assert store is not None
        layer.was_empty = store.max_count == 0
        self._save([layer], step)
        everyone = step.on(k.device, step.positions)
        active = step.routed.get(layer.index)
        positions = everyone if active is None else torch.where(step.on(k.device, active), everyone, -1)
        new_columns = self._new_columns(layer, k, v)
        if self.unrotated:
            assert self.rotation is not None
            k = self.rotation.unrotate(k, everyone)
        layer.hidden = None
        spare = None
        if fresh:
            # The first layer's growth makes room for the others too, so that the pool is not copied once per layer; not
            # for those that run fewer tokens.
            last = next((i for i in self.policy.routes_after if i >= layer.index), len(self.layers) - 1)
            spare = store.pages_needed(step.added) * sum(x.paged for x in self.layers[layer.index : last + 1])
            spare += spare // 8
        store.append(k, v, positions, self._added(step, layer), new_columns, spare)

    def _new_columns(self, layer: Layer, k: Tensor, v: Tensor) -> Tensor | None:
        """Side columns of new tokens, [N, R, H, T] float32: no score yet, and what the policy notes."""
        if not self.policy.columns:
            return None
        values = self.policy.append_columns(layer.view(), k, v)
        zero = k.new_zeros(k.shape[:3], dtype=torch.float32)
        return torch.stack([zero, *(values[name].float() for name in self.policy.columns)])

    def _open(self, layer: Layer, k: Tensor, v: Tensor) -> None:
        dtype = self.kv_dtype or k.dtype
        key = (k.shape[-1], v.shape[-1], dtype, k.device)
        storage = self.storages.get(key)
        if storage is None:
            storage = self.storages[key] = PageStorage(
                self.page_size, k.shape[-1], v.shape[-1], dtype, k.device, self.policy.page_bounds
            )
        layer.store = LayerStore(storage, k.shape[0], k.shape[1], self.policy.columns)
        if self.max_tokens is not None:
            # One partly filled page per row on top of what the tokens themselves fill.
            rows = self.pool_rows or layer.store.rows
            storage.allow(layer.index, layer.store.heads * (-(-self.max_tokens // self.page_size) + rows - 1))

    # -- finish: evict ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Close the forward: its tokens are now seen; fix budgets when a prompt ended; evict."""
        step = self.step
        assert step is not None
        if step.rewind is None:
            self.advance()
        self.step = None
        for layer in self.layers:
            layer.undo = None  # refers to the step, and that to layers: pages must not wait for the garbage collector
        self.unplanned |= step.prompt
        if not self.recording and self._prompt_left <= 0:
            self.prompt_length = None
            self.settle(step)
        elif not self.recording and self.prefill == "chunked":
            self.compress(self._prompt_left)
        if step.repeats is not None:
            self.select_rows(step.repeats.inverse)

    def advance(self, unseen: Sequence[Layer] = ()) -> None:
        """Count the tokens of the step that is under way as seen.

        ``unseen``: layers that will store them when a captured graph runs; the host counts that, too.
        """
        step = self.step
        assert step is not None
        step.rewind = (self.seen, self.tokens, self.real)
        self.seen += step.tokens
        self.tokens, self.real = step.after, step.real
        for layer in unseen:
            assert layer.store is not None
            layer.store.grew(step.added)
        if step.ready:
            for device, inputs in self._inputs.items():
                self._tokens_on[device] = (self.tokens, inputs.after)

    def account(self) -> list[tuple[LayerStore, dict[str, Any]]]:
        """What the host knows of the stores, to be put back by :meth:`restore`."""
        stores = [x.store for x in self.layers if x.store is not None]
        return [(s, s.account()) for s in stores]

    def restore(self, step: Step, before: list[tuple[LayerStore, dict[str, Any]]]) -> None:
        """Forget what the host noted of a forward that never ran: its capture failed."""
        for store, account in before:
            vars(store).update(account)
        step.wrote.clear()
        self._rewind(step)

    def _rewind(self, step: Step) -> None:
        if step.rewind is not None:
            self.seen, self.tokens, self.real = step.rewind
            step.rewind = None

    def inputs(self) -> list[Tensor]:
        """The memory in which devices find what the host says of a step."""
        return [x.block for x in self._inputs.values()]

    def abort(self) -> None:
        """Undo a forward that did not finish: its tokens leave the pages again."""
        step, self.step = self.step, None
        if step is None:
            return
        self._rewind(step)
        for layer in self.layers:
            layer.hidden = None
        if len(self.tokens) == 0:  # the first one: what comes next may have another number of rows
            told = self.recording, self.prompt_length
            self.reset()
            self.recording, self.prompt_length = told
            return
        for layer in self.layers:
            if layer.store is None or layer.undo is None or layer.undo[0] is not step:
                continue
            _, layer.state, pending, saved = layer.undo
            layer.undo = None
            del layer.pending[pending:]
            for tensor, before in saved:
                tensor.copy_(before)
            layer.store.crop(step.before.to(layer.store.counts.device))

    # -- changes between forwards -----------------------------------------------------------------------------------

    def crop(self, columns: int) -> None:
        """Forget the last ``columns`` seen columns; accept the scores of the others; then evict.

        Raises OutOfPages, with nothing changed, when that takes pages that ``max_tokens`` does not allow: what is
        shared (with rows, forks) is copied before it is changed.
        """
        limits, real = self.tokens, self.real
        if columns:
            if real is None:
                limits = (self.tokens - columns).int()
            else:
                real = real[:, : self.seen - columns]
                limits = real.sum(1, dtype=torch.int32)
        needs: dict[PageStorage, int] = {}
        for layer in self.layers:
            if layer.store is not None and layer.store.storage.limit is not None:
                pages = layer.store.pages_to_crop(limits) if columns else 0
                pages = max(pages, self.pages_to_evict(layer, 0, self.unplanned))
                needs[layer.store.storage] = needs.get(layer.store.storage, 0) + pages
        for storage, pages in needs.items():
            storage.reserve(pages)
        self.seen -= columns
        self.real = real
        for layer in self.layers:
            if layer.store is None:
                continue
            device = layer.store.counts.device
            for recorded in layer.pending:
                recorded.collect(self, layer, limits.to(device))
            layer.pending.clear()
            if columns:
                layer.store.crop(limits.to(device))
                layer.state = self.policy.crop_state(layer.state)
        self.tokens = limits
        self.settle()

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes the old row ``rows[r]``; pages are shared until one of them writes."""
        rows = rows.cpu().long()
        for layer in self.layers:
            if layer.store is None:
                continue
            layer.store.select_rows(rows)
            chosen = rows.to(layer.store.counts.device)
            layer.state = {k: v[chosen] if isinstance(v, Tensor) else v for k, v in layer.state.items()}
            layer.pending = [recorded.select_rows(chosen) for recorded in layer.pending]
            if layer.budgets is not None and layer.recent is not None:
                layer.set_budgets(layer.budgets[chosen], layer.recent[chosen])
        self.tokens = self.tokens[rows]
        self.prompt_tokens = self.prompt_tokens[rows] if len(self.prompt_tokens) else self.prompt_tokens
        self.real = None if self.real is None else self.real[rows]

    def join(self, other: Engine) -> None:
        """Take over the rows of ``other`` behind the own ones; it is empty then. Between forwards only.

        ``other`` follows the same policy and shares the own ``storages``. Rows end in the same column, so that the one
        that has seen less is padded on the left; a padded row behaves as it would alone.

        Raises ValueError, with nothing changed, if either waits for word of accepted tokens or is inside a prompt.
        """
        for engine in (self, other):
            if engine.recording or engine.step is not None or engine._prompt_left > 0 or engine.unplanned:
                raise ValueError("rows can join only between forwards, with a complete prompt and nothing to accept")
        mine, theirs = len(self.tokens), len(other.tokens)
        states = [joined(a.state, mine, b.state, theirs) for a, b in zip(self.layers, other.layers, strict=True)]
        for layer, coming, state in zip(self.layers, other.layers, states):
            self._join_layer(layer, mine, coming, theirs)
            layer.state = state
            layer.counters.update(coming.counters)
        seen = max(self.seen, other.seen)
        if self.seen != other.seen or self.real is not None or other.real is not None:
            real = []
            for engine, rows in ((self, mine), (other, theirs)):
                own = torch.ones(rows, engine.seen, dtype=torch.bool) if engine.real is None else engine.real
                real.append(torch.nn.functional.pad(own, (seen - engine.seen, 0), value=False))
            self.real = torch.cat(real)
        self.seen = seen
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.prompt_tokens = torch.cat([self.prompt_tokens, other.prompt_tokens])
        other.reset()
        self.drop_padding()

    def _join_layer(self, layer: Layer, mine: int, coming: Layer, theirs: int) -> None:
        """One layer of :meth:`join`; a layer that no token of one side ran (a schedule) has no store there."""
        known = layer.store or coming.store
        if known is None:
            return
        for x, rows in ((layer, mine), (coming, theirs)):
            if x.store is None:
                x.store = LayerStore(known.storage, rows, known.heads, self.policy.columns)
        assert layer.store is not None
        assert coming.store is not None
        layer.group = max(layer.group, coming.group)
        budgets, recents = [], []
        for x in (layer, coming):
            if x.budgets is None:
                x.engine.plan([x], prompt=False)
            assert x.budgets is not None
            assert x.recent is not None
            budgets.append(x.budgets)
            recents.append(x.recent)
        layer.store.join(coming.store)
        layer.set_budgets(torch.cat(budgets), torch.cat(recents))

    def pages_bound(self, totals: list[int]) -> dict[PageStorage, np.ndarray]:
        """Pages [rows] int64 that each row can come to hold, when row r ends with ``totals[r]`` real tokens.

        Between forwards, with budgets fixed: no head exceeds its budget, the policy's slack and the entries of one more
        step; heads that share their budgets out anew may hold what others held, and end in the middle of a page.
        """
        bounds: dict[PageStorage, np.ndarray] = {}
        most = np.asarray(totals, np.int64)[:, None]
        granted = {x.store: x.budgets_host.astype(np.int64) + 1 + self.policy.slack for x in self.layers if x.store}
        together = sum((x.sum(1) for x in granted.values()), start=np.zeros(len(most), np.int64))
        for store, budgets in granted.items():
            pages = (-(-np.minimum(most, budgets) // self.page_size)).sum(1)
            if self.policy.reallocates:
                heads = sum(x.heads for x in granted if x.storage is store.storage)
                bounds[store.storage] = np.minimum(most[:, 0] * heads, together) // self.page_size + heads
            else:
                bounds[store.storage] = bounds.get(store.storage, 0) + pages
        return bounds

    def drop_padding(self) -> None:
        """Forget leading columns that are padding in every row (rows that were longer have left)."""
        if self.real is None:
            return
        some = self.real.any(0)
        lead = int(some.int().argmax()) if bool(some.any()) else 0
        if lead:
            self.real = self.real[:, lead:].contiguous()
            self.seen -= lead
        if bool(self.real.all()):
            self.real = None

    def reset(self) -> None:
        """Forget everything; pages go back to the pool and memory to the machine."""
        for layer in self.layers:
            if layer.store is not None:
                layer.store.release()
            layer.store = layer.new = None
            layer.forget_budgets()
            layer.state, layer.pending, layer.undo, layer.saved = {}, [], None, {}
            layer.counters.clear()
        self.storages = {}
        self._inputs, self._tokens_on = {}, {}
        self.seen, self.step, self.real = 0, None, None
        self.tokens = self.prompt_tokens = torch.zeros(0, dtype=torch.int32)
        self.prompt_length, self.unplanned, self.recording = None, False, False

    # -- copies -----------------------------------------------------------------------------------------------------

    _COPIED = ("seen", "tokens", "prompt_tokens", "real", "recording", "prompt_length", "unplanned")

    def fork(self) -> Engine:
        """The same content again; pages are shared until one side writes."""
        twin = Engine(
            self.policy,
            [x.window for x in self.layers],
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            max_tokens=self.max_tokens,
            rotation=self.rotation,
            projections=self.projections,
            parallel=self.parallel,
            prefill=self.prefill,
        )
        twin.storages = dict(self.storages)
        for name in self._COPIED:
            setattr(twin, name, getattr(self, name))
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            theirs.store = None if mine.store is None else mine.store.fork()
            theirs.group = mine.group
            if theirs.store is not None:
                theirs.set_budgets(mine.budgets, mine.recent)
            theirs.pending = list(mine.pending)
            theirs.counters = Counter(mine.counters)
            theirs.state = copied(mine.state)
        return twin

    def export_state(self) -> dict[str, Any]:
        """Content as plain values and tensors: per layer the kept entries, densely by slot, and what goes with them."""
        layers: list[dict[str, Any] | None] = []
        for layer in self.layers:
            store = layer.store
            if store is None:
                layers.append(None)
                continue
            n = store.max_count
            layers.append(
                {
                    "keys": store.gather("keys"),
                    "values": store.gather("values"),
                    "counts": store.counts.clone(),
                    "positions": store.positions[..., :n].clone(),
                    "columns": store.columns[..., :n].clone(),
                    "budgets": layer.budgets,
                    "recent": layer.recent,
                    "group": layer.group,
                    "state": copied(layer.state),
                }
            )
        return {"layers": layers, **{name: getattr(self, name) for name in self._COPIED}}

    def import_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the content of :meth:`export_state` on ``device``; the engine must be empty."""
        for layer, content in zip(self.layers, state["layers"], strict=True):
            if content is None:
                continue
            k, v = content["keys"].to(device), content["values"].to(device)
            self._open(layer, k, v)
            store = layer.store
            assert store is not None
            # Heads are ragged, and an append is not: each (row, head) pair is written as a row of its own.
            store.fill(k, v, content["counts"], content["positions"], content["columns"])
            layer.group = content["group"]
            layer.set_budgets(content["budgets"], content["recent"])
            layer.state = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in copied(content["state"]).items()}
        for name in self._COPIED:
            setattr(self, name, state[name])


class PromptTooLong(OutOfPages, ValueError):
    """A prompt that ``max_tokens`` can never hold: out of pages, and a bad argument."""
