"""Attention over entries that merge, or move to other places, one head and one token at a time, in double precision.

Own code on purpose, as in dense.py: what stays is replayed from the log, what becomes of it is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache import D2O, CaM, EMASink, KVMerger
from support.dense import Oracle


@dataclass
class Entry:
    """An entry of one head: its key without rotation, its value, the attention that it has received."""

    key: Tensor
    value: Tensor
    score: float = 0.0
    merged: int = 0


Head = dict[int, Entry]  # by position


def ema_sink(policy: EMASink, layer: int, head: int, memory: dict, held: Head, leaving: list[int]) -> None:
    for p in leaving:
        sink = held.get(policy.pinned + (p - policy.sinks) % (policy.sinks - policy.pinned))
        if sink is None:
            continue
        sink.merged += 1
        alpha = sink.merged / (sink.merged + 1) if policy.counted else policy.alpha
        sink.key = alpha * sink.key + (1 - alpha) * held[p].key
        sink.value = alpha * sink.value + (1 - alpha) * held[p].value


def chance(seed: int, layer: int, head: int, position: int) -> float:
    x = position + ((seed * 1009 + layer) * 257 + head) * 0x10001
    for shift in (16, 15, 16):
        x = (x ^ (x >> shift)) * 0x9E3779B1 % 2**32
    return (x >> 8) / 2**24


def cam(policy: CaM, layer: int, head: int, memory: dict, held: Head, leaving: list[int]) -> None:
    stay = sorted(set(held) - set(leaving))
    for p in leaving:
        behind = [held[s] for s in stay if s > p][: policy.spread]
        mean = sum(e.score for e in behind) / max(len(behind), 1)
        if behind and chance(policy.seed, layer, head, p) < held[p].score / mean:
            for e in behind:
                e.value = e.value + held[p].value / policy.spread


def into_nearest(held: Head, leaving: list[int], weigh) -> None:
    """``weigh(cosines [leaving], keys, pivots)`` -> weights beside 1."""
    stay = sorted(set(held) - set(leaving))
    keys, others = (torch.stack([held[p].key for p in x]) for x in (leaving, stay))
    cosines = torch.stack([torch.cosine_similarity(k[None], others) for k in keys])
    target = [next(i for i, x in enumerate(row.tolist()) if x >= float(row.max()) - 1e-5) for row in cosines]
    weights = weigh(cosines.amax(1), keys, others[target])
    sums = {s: [held[s].key, held[s].value, 1.0] for s in stay}
    for p, t, w in zip(leaving, target, weights.tolist()):
        total = sums[stay[t]]
        total[:] = [total[0] + w * held[p].key, total[1] + w * held[p].value, total[2] + w]
    for s, (key, value, weight) in sums.items():
        held[s].key, held[s].value = key / weight, value / weight


def d2o(policy: D2O, layer: int, head: int, memory: dict, held: Head, leaving: list[int]) -> None:
    def weigh(cosines, keys, pivots):
        mean = float(cosines.mean())
        before = memory.get((layer, head))
        now = mean if before is None else before + policy.smoothing * (mean - before)
        memory[layer, head] = now
        return torch.where(cosines >= now - 1e-5, cosines.exp() / torch.e, 0.0)

    into_nearest(held, leaving, weigh)


def kvmerger(policy: KVMerger, layer: int, head: int, memory: dict, held: Head, leaving: list[int]) -> None:
    def weigh(cosines, keys, pivots):
        width = policy.bandwidth * pivots.norm(dim=1)
        return torch.exp(-(((keys - pivots).norm(dim=1) / width) ** 2) / 2)

    into_nearest(held, leaving, weigh)


RULES = {EMASink: ema_sink, CaM: cam, D2O: d2o, KVMerger: kvmerger}


class EntryOracle(Oracle):
    """Attention over entries that change when others leave, and stand where they are told to.

    ``log`` as for :class:`support.dense.Replay`, from the end of the prompt to the last token; ``active(layer)`` [T]
    bool: the tokens that run a layer; ``final[layer]``: keys and values [H, T, D] in the end, of the entries that are
    there, keys at their own positions. ``by_index``: a query and what it reads are rotated by their place among the
    entries.
    """

    def __init__(
        self, log, prompt: int, policy, inverse_frequencies: Tensor | None = None, active=None, by_index: bool = False
    ) -> None:
        self.log, self.prompt, self.policy, self.active = log, prompt, policy, active
        self.inverse_frequencies, self.by_index = inverse_frequencies, by_index
        self.rule, self.memory = RULES.get(type(policy)), {}
        self.final: dict[int, tuple[Tensor, Tensor]] = {}

    def turn(self, x: Tensor, positions) -> Tensor:
        """x [n, D] by ``positions`` [n]."""
        if self.inverse_frequencies is None:
            return x
        angle = torch.as_tensor(positions).double()[:, None] * self.inverse_frequencies.double()
        half = angle.shape[1]
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], 1)

    def attend(self, layer, q, k, v, causal, logits):
        tokens, group = q.shape[1], q.shape[0] // k.shape[0]
        runs = torch.ones(tokens, dtype=torch.bool) if self.active is None else self.active(layer)
        out = torch.zeros(q.shape[0], tokens, v.shape[2], dtype=v.dtype)
        final_k, final_v = k.clone(), v.clone()
        for h in range(k.shape[0]):
            mine, held = slice(h * group, (h + 1) * group), {}
            ends = [range(self.prompt), *(range(t, t + 1) for t in range(self.prompt, tokens))]
            for now in ends:
                for t in now:
                    if runs[t]:
                        held[t] = Entry(self.turn(k[h, t : t + 1], [-t])[0], v[h, t])
                if not held:
                    continue
                order = sorted(held)
                seen = torch.tensor(order) <= torch.arange(now.start, now.stop)[:, None]
                seen = seen & causal[now.start : now.stop, order]
                places = range(len(order)) if self.by_index else order
                keys = self.turn(torch.stack([held[p].key for p in order]), places)
                asking = q[mine, now.start : now.stop]
                if self.by_index:
                    ahead = [sum(p < t for p in order) - t for t in now]
                    asking = torch.stack([self.turn(x, ahead) for x in asking])
                p = logits(asking, keys[None], seen.expand(group, -1, -1)).nan_to_num()
                out[mine, now.start : now.stop] = p @ torch.stack([held[p].value for p in order])
                asked = p.mean(0)[runs[now.start : now.stop]].sum(0)
                for position, mass in zip(order, asked.tolist()):
                    held[position].score += mass
                stay = (self.log[now.stop][layer] or [[]] * k.shape[0])[h]  # a layer that never ran has no heads
                leaving = sorted(set(held) - set(stay))
                if leaving and self.rule is not None:
                    self.rule(self.policy, layer, h, self.memory, held, leaving)
                for position in leaving:
                    del held[position]
            for position, entry in held.items():
                final_k[h, position] = self.turn(entry.key[None], [position])[0]
                final_v[h, position] = entry.value
        self.final[layer] = final_k, final_v
        return out
