"""Random operations on caches, each compared with :class:`support.truth.Truth`; pages counted after every one."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import numpy as np
import torch

from kvcache import KVCache, OutOfPages, Policy, ops
from kvcache.engine import Engine
from kvcache.step import Attention
from support.truth import Head, Truth

HEADS, GROUP, DIM = 2, 2, 8
SCALE = DIM**-0.5


class Boom(Exception):
    """What the injected failures raise."""


@dataclass
class Pair:
    """A cache and what it must be."""

    engine: Engine
    truth: Truth
    cache: KVCache | None = None


@dataclass(frozen=True)
class Case:
    """How the caches of a run are made."""

    policy: Policy
    windows: tuple[int | None, ...] = (None,)
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    max_tokens: int | None = None
    prefill: str = "whole"


def compare(engine: Engine, truth: Truth) -> None:
    """The entries, scores, tables and bookkeeping of ``engine`` are those of ``truth``."""
    assert engine.step is None
    assert engine.seen == truth.seen
    assert engine.tokens.tolist() == truth.tokens
    size = engine.page_size
    for i, layer in enumerate(engine.layers):
        store = layer.store
        assert (store is not None) == truth.opened[i]
        if store is None:
            continue
        counts, table = store.counts.numpy(), store.table.numpy()
        assert counts.shape == (truth.rows, truth.kv_heads)
        assert store.max_count >= counts.max()
        assert not store.even or (counts == store.max_count).all()
        pages = -(-counts // size)
        assert ((table >= 0) == (np.arange(table.shape[2]) < pages[..., None])).all()
        positions = store.positions.numpy()
        slots = np.arange(positions.shape[2])
        order = np.argsort(np.where(slots < counts[..., None], positions, 1 << 30), axis=2)
        live = slots < counts[..., None]
        positions = np.take_along_axis(positions, order, 2)
        for r in range(truth.rows) if truth.ties else ():
            for h in range(truth.kv_heads):
                truth.agree(i, r, h, positions[r, h, : counts[r, h]])
        heads = [head for row in truth.heads[i] for head in row]
        assert counts.ravel().tolist() == [len(head.positions) for head in heads], i
        expected = {n: np.concatenate([getattr(head, n) for head in heads]) for n in Head.__dataclass_fields__}
        assert (positions[live] == expected["positions"]).all(), (i, positions[live], expected["positions"])
        page, place = np.take_along_axis(table, order // size, 2)[live], (order % size)[live]
        storage = store.storage
        assert (storage.k_pages[page, place].float().numpy() == expected["keys"]).all(), i
        assert (storage.v_pages[page, place].float().numpy() == expected["values"]).all(), i
        scores = np.take_along_axis(store.columns[0].numpy(), order, 2)[live]
        assert np.abs(scores - expected["scores"]).max(initial=0) < truth.close / 4, i
    truth.ties = {}


def count_pages(engines: list[Engine], references: bool = False) -> None:
    """Every page in use is in a table of ``engines``, as often as it has references."""
    storages, tables = {}, {}
    for engine in engines:
        for layer in engine.layers:
            if layer.store is not None:
                storage = layer.store.storage
                storages[id(storage)] = storage
                tables.setdefault(id(storage), []).append(layer.store.table.numpy().ravel())
        for storage in engine.storages.values():
            storages[id(storage)] = storage
    for key, storage in storages.items():
        table = np.concatenate(tables.get(key, [np.zeros(0, np.int32)]))
        held = np.bincount(table[table >= 0])
        pool = storage.pool
        assert pool.used == np.count_nonzero(held)
        assert pool.used + pool.free_pages == pool.capacity == len(storage.k_pages) == len(storage.v_pages)
        assert storage.limit is None or pool.capacity <= storage.limit
        if references:
            assert all(pool.refcount(int(page)) == held[page] for page in held.nonzero()[0])


def content(engine: Engine) -> list:
    """Everything that a failed forward must leave as it was."""
    out = [engine.seen, engine.tokens.tolist(), engine.recording, engine.prompt_length, engine.unplanned]
    for layer in engine.layers:
        if layer.store is not None:
            n = layer.store.max_count
            slots = np.arange(n) < layer.store.counts.numpy()[..., None]
            out += [layer.store.positions.numpy()[..., :n][slots].tolist(), len(layer.pending)]
            out += [layer.store.columns[0].numpy()[..., :n][slots].tolist(), sorted(layer.state)]
            out += [None if layer.budgets is None else layer.budgets.tolist()]
    return out


class Machine:
    """Caches of one :class:`Case` under random operations. ``done`` counts them by kind."""

    #: Operation -> how often.
    WEIGHTS: ClassVar = {
        "decode": 30, "several": 10, "failing": 9, "crop": 9, "reorder": 8, "fork": 6, "drop": 5, "record": 5,
        "pickle": 2, "reset": 1, "prompt": 4, "repeat": 2,
    }  # fmt: skip

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.random = case, random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.done: Counter[str] = Counter()
        self.pairs = [self.fresh()]
        self.names, self.weights = zip(*self.WEIGHTS.items())

    def fresh(self) -> Pair:
        c = self.case
        engine = Engine(
            c.policy, list(c.windows), page_size=c.page_size, kv_dtype=c.kv_dtype, max_tokens=c.max_tokens,
            prefill=c.prefill,
        )  # fmt: skip
        half = torch.bfloat16 in (c.dtype, c.kv_dtype) or torch.float16 in (c.dtype, c.kv_dtype)
        return Pair(engine, Truth(c.policy, list(c.windows), HEADS, SCALE, c.prefill, close=4e-3 if half else 4e-4))

    def run(self, operations: int) -> Counter[str]:
        for _ in range(operations):
            self.step()
        self.end()
        return self.done

    def step(self) -> None:
        name = self.random.choices(self.names, self.weights)[0]
        pair = self.random.choice(self.pairs)
        if getattr(self, name)(pair) is False:
            name += ", impossible then"
        self.done[name] += 1
        if pair in self.pairs:
            compare(pair.engine, pair.truth)
        del pair
        whole = self.random.random() < 0.05
        count_pages([p.engine for p in self.pairs], references=whole)
        if whole:  # what one cache did changed no other
            for other in self.pairs:
                compare(other.engine, other.truth)

    def end(self) -> None:
        pools = {id(s): s.pool for p in self.pairs for s in p.engine.storages.values()}
        self.pairs.clear()
        assert not any(pool.used for pool in pools.values())

    # -- forwards ---------------------------------------------------------------------------------------------------

    def inputs(self, truth: Truth, tokens: int) -> tuple[np.ndarray, list[tuple]]:
        """Which new columns are real [R, T], and q, k, v of each layer."""
        first = not truth.real
        rows = self.random.randint(1, 3) if first else truth.rows
        real = np.ones((rows, tokens), bool)
        if self.random.random() < (0.7 if first else 0.2):
            kind = self.random.choice(["left", "right", "any"])
            for r in range(rows):
                n = self.random.randint(0, tokens - 1 if first else tokens)
                if kind == "any":
                    real[r] = self.numbers.random(tokens) < 0.7
                else:
                    real[r, slice(0, n) if kind == "left" else slice(tokens - n, None)] = False
        return real, [self.qkv(rows, tokens) for _ in self.case.windows]

    def qkv(self, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
        made = self.numbers.standard_normal((rows, HEADS * GROUP + 2 * HEADS, tokens, DIM), dtype=np.float32)
        q, k, v = torch.from_numpy(made).to(self.case.dtype).split([HEADS * GROUP, HEADS, HEADS], 1)
        return 1.5 * q, k, v

    def stored(self, layers: list[tuple]) -> list[tuple]:
        """As numpy, with what storing rounds off."""
        kv = self.case.kv_dtype or self.case.dtype
        return [(q.float().numpy(), k.to(kv).float().numpy(), v.to(kv).float().numpy()) for q, k, v in layers]

    def mask(self, truth: Truth, real: np.ndarray) -> torch.Tensor | None:
        past = np.array(truth.real, bool).reshape(len(real), -1)
        whole = np.concatenate([past, real], 1)
        return None if whole.all() and self.random.random() < 0.5 else torch.from_numpy(whole)

    def engine_forward(
        self, engine: Engine, real, mask, layers, fail: tuple[int, str] | None = None, alike=None
    ) -> list:
        """The forward as the hooks of a model do it; ``fail``: (layer, where) raises Boom there."""
        rows, tokens = real.shape
        engine.begin(rows, tokens, mask, alike)
        outputs = []
        try:
            for layer, (q, k, v) in zip(engine.layers, layers):
                where = fail[1] if fail and fail[0] == layer.index else ""
                if layer.index in engine.step.skipped:
                    outputs.append(None)
                    continue
                with ExitStack() as stack:
                    if where == "before":
                        raise Boom
                    if where in ("append", "attention"):
                        names = ["append"] if where == "append" else ["prefill_attention", "decode_attention"]
                        for name in names:
                            stack.enter_context(mock.patch.object(ops, name, side_effect=Boom))
                    engine.append(layer, k, v, engine.step)
                    layer.new = (k, v)
                    if where == "between":
                        raise Boom
                    outputs.append(engine.attend(layer, q, Attention(scale=SCALE)))
                    if where:  # torch's dense attention may have been used instead
                        raise Boom
            if fail and fail[0] == len(engine.layers):
                raise Boom
        except BaseException:
            engine.abort()
            raise
        engine.finish()
        return outputs

    def forward(self, pair: Pair, tokens: int, alike: bool = False) -> bool:
        real, layers = self.inputs(pair.truth, tokens)
        first = None
        if alike and not pair.truth.real:
            # Rows that are copies of the first one of their kind.
            first = [self.random.randint(0, r) for r in range(len(real))]
            first = [f if first[f] == f else r for r, f in enumerate(first)]
            real, layers = real[first], [tuple(x[first] for x in qkv) for qkv in layers]
            first = torch.tensor(first)
        mask = self.mask(pair.truth, real)
        before = content(pair.engine)
        try:
            outputs = self.engine_forward(pair.engine, real, mask, layers, alike=first)
        except OutOfPages:
            assert self.case.max_tokens is not None
            assert content(pair.engine) == before
            return False
        truth = pair.truth
        expected = truth.forward(real, self.stored(layers))
        if truth.reads_all:
            tolerance = 2e-5 if self.case.dtype == torch.float32 and self.case.kv_dtype is None else 3e-2
            for found, right in zip(outputs, expected):
                assert (found is None) == bool(np.isnan(right).all() and found is None)
                if found is not None:
                    known = ~np.isnan(right)
                    assert np.abs(found.float().numpy()[known] - right[known]).max(initial=0) < tolerance
        return True

    def decode(self, pair: Pair) -> bool:
        return self.forward(pair, 1)

    def several(self, pair: Pair) -> bool:
        return self.forward(pair, self.random.randint(2, 7))

    def failing(self, pair: Pair) -> bool:
        """A forward that fails in a random place; then, sometimes, the same one again, which must be as if nothing had
        happened."""
        real, layers = self.inputs(pair.truth, self.random.choice([1, 1, 2, 5]))
        mask = self.mask(pair.truth, real)
        place = self.random.choice(["before", "append", "between", "attention", "after"])
        fail = (self.random.randrange(len(layers) + (place == "after")), place)
        twin = pair.engine.fork() if self.random.random() < 0.2 else None
        before = content(pair.engine)
        try:
            self.engine_forward(pair.engine, real, mask, layers, fail)
        except Boom:
            pass
        except OutOfPages:
            assert self.case.max_tokens is not None
        else:  # the layer was skipped
            pair.truth.forward(real, self.stored(layers))
            return False
        assert content(pair.engine) == before
        if twin is not None:
            self.again(pair, twin, real, mask, layers)
        return True

    def again(self, pair: Pair, twin: Engine, real, mask, layers) -> None:
        try:
            expected = self.engine_forward(twin, real, mask, layers)
        except OutOfPages:
            return
        try:
            found = self.engine_forward(pair.engine, real, mask, layers)
        except OutOfPages:  # the twin has taken some
            return
        pair.truth.forward(real, self.stored(layers))
        for a, b in zip(found, expected):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.nan_to_num(), b.nan_to_num())

    # -- everything else --------------------------------------------------------------------------------------------

    def crop(self, pair: Pair) -> bool:
        columns = self.random.choice([0, 0, 1, 1, 2, 3, 5, 40])
        columns = min(columns, pair.engine.seen)
        if not pair.truth.real:
            return False
        before = content(pair.engine)
        try:
            pair.engine.crop(columns)
        except OutOfPages:
            assert self.case.max_tokens is not None
            assert content(pair.engine) == before
            return False
        pair.truth.crop(columns)
        if pair.truth.recording and self.random.random() < 0.5:
            pair.engine.recording = pair.truth.recording = False
        return True

    def record(self, pair: Pair) -> None:
        pair.engine.recording = pair.truth.recording = not pair.truth.recording

    def reorder(self, pair: Pair) -> bool:
        if not pair.truth.real:
            return False
        rows = [self.random.randrange(pair.truth.rows) for _ in range(self.random.randint(1, 4))]
        pair.engine.select_rows(torch.tensor(rows))
        pair.truth.select_rows(rows)
        return True

    def repeat(self, pair: Pair) -> bool:
        """A fresh cache whose first forward has rows that are alike."""
        pair.engine.reset()
        pair.truth.reset()
        return self.forward(pair, self.random.randint(1, 12), alike=True)

    def fork(self, pair: Pair) -> bool:
        if len(self.pairs) >= 4:
            return False
        self.pairs.append(Pair(pair.engine.fork(), pair.truth.twin()))
        return True

    def drop(self, pair: Pair) -> None:
        self.pairs.remove(pair)
        if not self.pairs:
            self.pairs.append(self.fresh())

    def pickle(self, pair: Pair) -> bool:
        if any(layer.pending for layer in pair.engine.layers):
            return False
        state = pickle.loads(pickle.dumps(pair.engine.export_state()))
        engine = self.fresh().engine
        try:
            engine.import_state(state, torch.device("cpu"))
        except OutOfPages:  # rows that shared pages no longer do
            assert self.case.max_tokens is not None
            return False
        pair.engine = engine
        return True

    def reset(self, pair: Pair) -> None:
        pair.engine.reset()
        pair.truth.reset()

    def prompt(self, pair: Pair) -> bool:
        """A prompt in chunks, as ``generate(prefill_chunk_size=n)`` reads it."""
        pieces = [self.random.randint(1, 6) for _ in range(self.random.randint(1, 3))]
        pair.engine.prompt_length = pair.truth.prompt_length = pair.truth.seen + sum(pieces)
        done = [self.forward(pair, n) for n in pieces]
        return all(done)


class ModelMachine(Machine):
    """The same through a wrapped model of transformers: its hooks open, close and undo the forwards, its layers make
    the queries, keys and values, which are recorded on their way into the engine."""

    def __init__(self, case: Case, seed: int, model) -> None:
        self.model = model
        super().__init__(case, seed)

    def fresh(self) -> Pair:
        c = self.case
        options = {"page_size": c.page_size, "max_tokens": c.max_tokens, "prefill": c.prefill}
        return self.pair(KVCache(self.model, c.policy, **options))

    def pair(self, cache, truth: Truth | None = None) -> Pair:
        config = self.model.config
        if truth is None:
            windows = [layer.window for layer in cache.engine.layers]
            scale = config.head_dim**-0.5
            truth = Truth(self.case.policy, windows, config.num_key_value_heads, scale, self.case.prefill, close=4e-4)
        return Pair(cache.engine, truth, cache)

    def inputs(self, truth: Truth, tokens: int):
        real, _ = super().inputs(truth, tokens)
        if not truth.real:
            real[~real.any(1), -1] = True  # as generate() asks of every prompt
        ids = torch.from_numpy(self.numbers.integers(3, self.model.config.vocab_size, real.shape))
        return real, ids

    def model_forward(self, pair: Pair, real, ids, fail: tuple[int, str] | None = None, cache=None):
        """(logits, (q, k, v) of each layer, its outputs); Boom is raised in layer ``fail[0]`` at ``fail[1]``."""
        recorded = [[None] * len(pair.engine.layers), [None] * len(pair.engine.layers)]
        append, attend = Engine.append, Engine.attend

        def recording_append(engine, layer, k, v, step):
            places = step.positions if step.repeats is None else step.repeats.spread(step.positions)
            stored = engine.rotation.unrotate(k, places) if engine.compact else k
            recorded[0][layer.index] = [None, stored.numpy(), v.numpy()]
            append(engine, layer, k, v, step)

        def recording_attend(engine, layer, q, ask, dense=None):
            recorded[0][layer.index][0] = q.numpy()
            out = attend(engine, layer, q, ask, dense)
            recorded[1][layer.index] = out.numpy()
            return out

        past = np.array(pair.truth.real, bool).reshape(len(real), -1)
        mask = torch.from_numpy(np.concatenate([past, real], 1))
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -real.shape[1] :]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Engine, "append", recording_append))
            stack.enter_context(mock.patch.object(Engine, "attend", recording_attend))
            if fail is not None:
                stack.enter_context(self.failure(*fail))
            logits = self.model(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache or pair.cache
            ).logits
        return logits, *recorded

    def failure(self, layer: int, place: str):
        """Something that raises Boom in one layer of the next forward."""
        if place in ("append", "attention"):
            names = {"append": ["append"], "attention": ["prefill_attention", "decode_attention"]}[place]
            calls = iter(range(10**9))
            stack = ExitStack()
            for name in names:
                original = getattr(ops, name)

                def late(*args, original=original, **kwargs):
                    if next(calls) >= layer:
                        raise Boom
                    return original(*args, **kwargs)

                stack.enter_context(mock.patch.object(ops, name, late))
            return stack
        block = self.model.model.layers[layer]
        module = {"before": block.input_layernorm, "between": block.self_attn.o_proj, "after": self.model.lm_head}[
            place
        ]
        return mock.patch.object(module, "forward", side_effect=Boom)

    def forward(self, pair: Pair, tokens: int, alike: bool = False) -> bool:
        real, ids = self.inputs(pair.truth, tokens)
        if alike:
            first = [self.random.randint(0, r) for r in range(len(real))]
            real, ids = real[first], ids[first]
        before = content(pair.engine)
        try:
            _, layers, found = self.model_forward(pair, real, ids)
        except OutOfPages:
            assert self.case.max_tokens is not None
            assert content(pair.engine) == before
            return False
        self.follow(pair, real, layers, found)
        return True

    def follow(self, pair: Pair, real, layers, found) -> None:
        """The truth reads what the model's layers made."""
        rows, tokens = real.shape
        config = self.model.config
        none = [np.zeros((rows, h, tokens, config.head_dim)) for h in (config.num_attention_heads,)]
        none += [np.zeros((rows, config.num_key_value_heads, tokens, config.head_dim))] * 2
        expected = pair.truth.forward(real, [qkv or none for qkv in layers])
        if pair.truth.reads_all:
            for a, b in zip(found, expected):
                known = ~np.isnan(b)
                assert (a is None) == (not known.any())
                assert a is None or np.abs(a[known] - b[known]).max(initial=0) < 5e-5

    def failing(self, pair: Pair) -> bool:
        real, ids = self.inputs(pair.truth, self.random.choice([1, 1, 2, 5]))
        place = self.random.choice(["before", "append", "between", "attention", "after"])
        twin = pair.cache.fork() if self.random.random() < 0.2 else None
        before = content(pair.engine)
        try:
            _, layers, found = self.model_forward(
                pair, real, ids, (self.random.randrange(len(pair.engine.layers)), place)
            )
        except Boom:
            pass
        except OutOfPages:
            assert self.case.max_tokens is not None
        else:  # the layer was skipped
            self.follow(pair, real, layers, found)
            return False
        assert content(pair.engine) == before
        if twin is not None:
            try:
                expected = self.model_forward(pair, real, ids, cache=twin)[0]
                logits, layers, found = self.model_forward(pair, real, ids)
            except OutOfPages:
                return True
            assert torch.equal(logits, expected)
            self.follow(pair, real, layers, found)
        return True

    def crop(self, pair: Pair) -> bool:
        columns = min(self.random.choice([0, 1, 2, 3, 40]), pair.engine.seen)
        if not pair.truth.real:
            return False
        before = content(pair.engine)
        try:
            pair.cache.crop(-columns)
        except OutOfPages:
            assert content(pair.engine) == before
            return False
        pair.truth.crop(columns)
        if pair.truth.recording:
            pair.engine.recording = pair.truth.recording = False
        return True

    def record(self, pair: Pair) -> None:
        pair.cache.activate_past_recording()
        pair.truth.recording = True

    def reorder(self, pair: Pair) -> bool:
        if not pair.truth.real:
            return False
        rows = [self.random.randrange(pair.truth.rows) for _ in range(self.random.randint(1, 4))]
        self.random.choice([pair.cache.reorder_cache, pair.cache.batch_select_indices])(torch.tensor(rows))
        pair.truth.select_rows(rows)
        return True

    def repeat(self, pair: Pair) -> bool:
        self.reset(pair)
        return self.forward(pair, self.random.randint(1, 12), alike=True)

    def fork(self, pair: Pair) -> bool:
        if len(self.pairs) >= 4:
            return False
        self.pairs.append(self.pair(pair.cache.fork(), pair.truth.twin()))
        return True

    def pickle(self, pair: Pair) -> bool:
        if any(layer.pending for layer in pair.engine.layers):
            return False
        c = self.case
        state = pickle.loads(pickle.dumps(pair.cache.export_state()))
        options = {"page_size": c.page_size, "max_tokens": c.max_tokens, "prefill": c.prefill}
        try:
            pair.cache = KVCache.import_state(self.model, state, **options)
        except OutOfPages:
            return False
        pair.engine = pair.cache.engine
        return True

    def reset(self, pair: Pair) -> None:
        pair.cache.reset()
        pair.truth.reset()
