"""What a cache must hold and answer after any sequence of operations, in plain numpy: an independent model.

Own code on purpose: nothing of kvcache decides anything here. A head is four arrays in the order of positions; they are
never written, only replaced, so that a copy of the truth is a copy of its lists. What it says of the policies is their
closed form (docs/policies.md): H2O's scores are summed here from softmaxes of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np

from kvcache import H2O, RandomEviction, SkipDecode, StreamingLLM, TokenSelect
from support.policies import active_layers, part


@dataclass(frozen=True)
class Head:
    """Entries of one (layer, row, kv head): positions [n] ascending, keys [n, D], values [n, Dv], scores [n]."""

    positions: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    scores: np.ndarray

    def take(self, which) -> Head:
        return Head(self.positions[which], self.keys[which], self.values[which], self.scores[which])


def share(value, tokens: int) -> int:
    """A budget in tokens."""
    return value if isinstance(value, int) else int(value * tokens)


@dataclass
class Waiting:
    """Attention mass of one query that waits for word of its acceptance."""

    row: int
    head: int
    query: int
    positions: np.ndarray
    mass: np.ndarray


@dataclass
class Truth:
    """One cache. ``heads[layer][row][head]``; ``real[row]``: which columns hold tokens; [] before the first forward."""

    policy: object
    windows: list[int | None]
    kv_heads: int
    scale: float
    prefill: str = "whole"
    close: float = 1e-4  # scores nearer than that are taken for equal
    real: list[list[bool]] = field(default_factory=list)
    heads: list[list[list[Head]]] = field(default_factory=list)
    opened: list[bool] = field(default_factory=list)
    limits: list[list[tuple[int, int]] | None] = field(default_factory=list)  # layer -> row -> (budget, recent)
    waiting: list[list[Waiting]] = field(default_factory=list)
    seen: int = 0
    prompt_tokens: list[int] = field(default_factory=list)
    prompt_length: int | None = None
    unplanned: bool = False
    recording: bool = False

    def __post_init__(self):
        n = len(self.windows)
        self.heads = self.heads or [[] for _ in range(n)]
        self.opened = self.opened or [False] * n
        self.limits = self.limits or [None] * n
        self.waiting = self.waiting or [[] for _ in range(n)]

    def twin(self) -> Truth:
        other = copy.copy(self)
        other.real = [list(r) for r in self.real]
        other.heads = [[list(row) for row in layer] for layer in self.heads]
        other.opened, other.limits = list(self.opened), [None if x is None else list(x) for x in self.limits]
        other.waiting, other.prompt_tokens = [list(x) for x in self.waiting], list(self.prompt_tokens)
        return other

    def reset(self) -> None:
        self.__dict__.update(Truth(self.policy, self.windows, self.kv_heads, self.scale, self.prefill).__dict__)

    @property
    def rows(self) -> int:
        return len(self.real)

    @property
    def tokens(self) -> list[int]:
        return [sum(r) for r in self.real]

    @property
    def prompt_left(self) -> int:
        return 0 if self.prompt_length is None else self.prompt_length - self.seen

    def in_prompt(self, tokens: int) -> bool:
        return self.seen == 0 or (tokens > 1 and not self.recording) or self.prompt_left > 0

    # -- one forward ------------------------------------------------------------------------------------------------

    def places(self, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, reach) [R, T] of new columns ``real`` [R, T] bool; -1: padding, or nothing to read."""
        before = np.array(self.tokens if self.real else [0] * len(real))[:, None]
        reach = before + real.cumsum(1) - 1
        return np.where(real, reach, -1), reach

    def runs(self, layer: int, reach: np.ndarray, prompt: bool) -> np.ndarray:
        """Which tokens run a layer, [R, T] bool."""
        skip = part(self.policy, SkipDecode)
        if skip is None:
            return np.ones(reach.shape, bool)
        return np.array(
            [[layer in active_layers(skip, max(p, 0), len(self.windows), prompt) for p in r] for r in reach]
        )

    def forward(self, real: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Read columns ``real`` [R, T]; ``layers``: q [R, Hq, T, D], k [R, H, T, D], v of each. What each layer attends
        to, [R, T, Hq, Dv]; NaN where a token does not run the layer or has nothing to read."""
        rows, tokens = real.shape
        if not self.real:
            self.real = [[] for _ in range(rows)]
        positions, reach = self.places(real)
        prompt = self.in_prompt(tokens)
        self.real = [past + new for past, new in zip(self.real, real.tolist())]
        out = [self._layer(i, positions, reach, prompt, *qkv) for i, qkv in enumerate(layers)]
        self.seen += tokens
        self.unplanned |= prompt
        if not self.recording and self.prompt_left <= 0:
            self.prompt_length = None
            self.settle()
        elif not self.recording and self.prefill == "chunked":
            self.prompt_tokens = [n + self.prompt_left for n in self.tokens]
            for layer in range(len(self.windows)):
                if self.opened[layer]:
                    self._plan(layer)
                    self._evict(layer)
        return out

    def _layer(self, layer, positions, reach, prompt, q, k, v) -> np.ndarray:
        rows, tokens = positions.shape
        active = self.runs(layer, reach, prompt)
        out = np.full((rows, tokens, q.shape[1], v.shape[3]), np.nan)
        if not active.any():
            return out
        if not self.opened[layer]:
            self.opened[layer] = True
            none = Head(np.zeros(0, int), np.zeros((0, k.shape[3])), np.zeros((0, v.shape[3])), np.zeros(0))
            self.heads[layer] = [[none] * self.kv_heads for _ in range(rows)]
        group = q.shape[1] // self.kv_heads
        counted = part(self.policy, H2O)
        for r in range(rows):
            stored = active[r] & (positions[r] >= 0)
            first = self._window_start(layer, r, tokens)
            for h in range(self.kv_heads):
                head = self.heads[layer][r][h]
                if stored.any():
                    new = positions[r][stored], k[r, h][stored], v[r, h][stored], np.zeros(int(stored.sum()))
                    old = head.positions, head.keys, head.values, head.scores
                    head = Head(*(np.concatenate(pair) for pair in zip(old, new)))
                if not len(head.positions):
                    self.heads[layer][r][h] = head
                    continue
                visible = (head.positions <= reach[r][:, None]) & (head.positions >= first[:, None])
                asks = active[r] & visible.any(1)
                heads = slice(h * group, (h + 1) * group)
                logits = np.where(visible, q[r, heads] @ head.keys.T * self.scale, -np.inf)  # [G, T, n]
                with np.errstate(invalid="ignore"):
                    p = np.exp(logits - logits.max(2, keepdims=True))
                    p /= p.sum(2, keepdims=True)
                out[r, asks, heads] = (p @ head.values).transpose(1, 0, 2)[asks]
                if counted is not None:
                    mass = p.max(0) if counted.group == "max" else p.mean(0)
                    counts = asks & (positions[r] >= 0)
                    if self.recording:
                        for t in counts.nonzero()[0]:
                            at = int(positions[r, t])
                            self.waiting[layer].append(Waiting(r, h, at, head.positions, mass[t]))
                    else:
                        head = replace(head, scores=head.scores + mass[counts].sum(0))
                self.heads[layer][r][h] = head
        return out

    def _window_start(self, layer: int, row: int, tokens: int) -> np.ndarray:
        """First position that each of the last ``tokens`` columns may read: windows are measured in columns."""
        if self.windows[layer] is None:
            return np.zeros(tokens, int)
        passed = np.concatenate([[0], np.cumsum(self.real[row])])
        return passed[np.maximum(np.arange(self.seen, self.seen + tokens) + 1 - self.windows[layer], 0)]

    # -- eviction ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        plan, self.unplanned = self.unplanned, False
        if plan:
            self.prompt_tokens = self.tokens
        for layer in range(len(self.windows)):
            if self.opened[layer]:
                if plan or self.limits[layer] is None:
                    self._plan(layer)
                self._evict(layer, 0 if plan else self.policy.slack)

    def _plan(self, layer: int) -> None:
        window = self.windows[layer]
        found = []
        for n in self.prompt_tokens:
            budget, recent = 10**9, 0
            if (p := part(self.policy, StreamingLLM)) is not None:
                recent = max(share(p.window, n), 1)
                budget = p.sinks + recent
            elif (p := part(self.policy, H2O)) is not None:
                recent = share(p.recent, n)
                budget = max(share(p.heavy, n) + recent, 1)
            elif (p := part(self.policy, RandomEviction)) is not None:
                recent = share(p.recent, n)
                budget = max(share(p.keep, n), 1)
            if window is not None:
                budget = min(budget, max(window - 1, 1))
            found.append((budget, recent))
        self.limits[layer] = found

    def _worth(self, layer: int, head: int, kept: Head) -> np.ndarray:
        """What each entry is worth to the policy; the least worth leaves."""
        if part(self.policy, H2O) is not None:
            return kept.scores
        if (p := part(self.policy, RandomEviction)) is not None:
            x = kept.positions.astype(np.uint64)
            x = x + np.uint64(((p.seed * 1009 + layer) * 257 + head) * 0x10001)
            for shift in (16, 15, 16):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)
            return (x >> np.uint64(8)).astype(float)
        return kept.positions.astype(float)

    def _evict(self, layer: int, slack: int = 0) -> None:
        window = self.windows[layer]
        kinds = (StreamingLLM, RandomEviction)
        sinks = next((p.sinks for kind in kinds if (p := part(self.policy, kind)) is not None), 0)
        for r, tokens in enumerate(self.tokens):
            budget, recent = self.limits[layer][r]
            first, end, gone = sinks, tokens - recent, 0
            if window is not None:
                first, gone = 0, sum(self.real[r][: max(self.seen + 1 - window, 0)])
            for h, head in enumerate(self.heads[layer][r]):
                if len(head.positions) <= budget + slack:
                    continue
                free = (head.positions >= first) & (head.positions < end)
                worth = np.where(free, self._worth(layer, h, head), np.inf)
                if part(self.policy, (H2O, RandomEviction)) is not None:  # the others drop the oldest anyway
                    worth[free & (head.positions < gone)] = -np.inf  # what no later query can see
                order = np.lexsort((-head.positions, worth))  # among equals the newest leaves
                leaves = order[: min(len(order) - budget, int(free.sum()))]
                stays = np.ones(len(order), bool)
                stays[leaves] = False
                self.heads[layer][r][h] = head.take(stays)
                if part(self.policy, H2O) is not None and stays.any() and len(leaves):
                    self._remember_ties(layer, r, h, head, free, worth, stays)

    #: What H2O chose by less than ``close``: (layer, row, head) -> entries that might have stayed as well.
    ties: dict = field(default_factory=dict)

    def _remember_ties(self, layer, r, h, head, free, worth, stays) -> None:
        margin = worth[free & stays]
        edge = margin.min() if len(margin) else np.inf
        near = free & ((~stays & (worth > edge - self.close)) | (stays & (worth < worth[~stays].max() + self.close)))
        if (near & ~stays).any():
            self.ties[layer, r, h] = head.take(stays | near), set(head.positions[near].tolist())

    def agree(self, layer: int, r: int, h: int, positions: np.ndarray) -> None:
        """Take over what the cache chose among entries whose scores are as good as equal."""
        if (found := self.ties.get((layer, r, h))) is None or np.array_equal(
            self.heads[layer][r][h].positions, positions
        ):
            return
        every, near = found
        mine, theirs = set(self.heads[layer][r][h].positions.tolist()), set(positions.tolist())
        if len(mine) == len(theirs) and mine ^ theirs <= near:
            self.heads[layer][r][h] = every.take(np.isin(every.positions, positions))

    # -- changes between forwards -----------------------------------------------------------------------------------

    def crop(self, columns: int) -> None:
        self.seen -= columns
        self.real = [row[: self.seen] for row in self.real]
        limits = self.tokens
        for layer in range(len(self.windows)):
            for w in self.waiting[layer]:
                if w.query < limits[w.row]:
                    head = self.heads[layer][w.row][w.head]
                    mass = dict(zip(w.positions.tolist(), w.mass.tolist()))
                    more = np.array([mass.get(p, 0.0) for p in head.positions.tolist()])
                    self.heads[layer][w.row][w.head] = replace(head, scores=head.scores + more)
            self.waiting[layer] = []
            for r, row in enumerate(self.heads[layer]):
                row[:] = [x if x.positions.size == 0 or x.positions[-1] < limits[r] else x.take(x.positions < limits[r])
                          for x in row]  # fmt: skip
        self.settle()

    def select_rows(self, rows: list[int]) -> None:
        self.real = [list(self.real[r]) for r in rows]
        self.heads = [[list(layer[r]) for r in rows] if layer else [] for layer in self.heads]
        self.limits = [None if x is None else [x[r] for r in rows] for x in self.limits]
        self.prompt_tokens = [self.prompt_tokens[r] for r in rows] if self.prompt_tokens else []
        self.waiting = [
            [replace(w, row=new) for new, old in enumerate(rows) for w in layer if w.row == old]
            for layer in self.waiting
        ]
        self.ties = {}

    @property
    def reads_all(self) -> bool:
        """Whether a query reads every entry that the cache holds."""
        return part(self.policy, TokenSelect) is None
