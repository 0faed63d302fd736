"""An independent oracle: dense attention over the whole sequence under an explicit per-head visibility.

Own code on purpose: nothing of kvcache is used here. One forward over a sequence of T tokens computes what a cache
with eviction or selection computes step by step, as long as query t sees exactly the entries that the cache held.
Single row, no padding: that rows of a batch equal rows alone is an oracle of its own.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "dense_oracle"
_active: list = []


class Oracle:
    """Causal attention. Subclasses say what else is hidden, or attend in their own way."""

    def visible(self, layer: int, q: Tensor, k: Tensor, probabilities) -> Tensor:
        """bool [kv heads, T, T] (query, key), on top of causal and sliding window.

        ``probabilities(visible)`` gives the attention of all query heads under a visibility, [heads, T, T].
        """
        return torch.ones(k.shape[0], q.shape[1], q.shape[1], dtype=torch.bool)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, causal: Tensor, logits) -> Tensor:
        """q [Hq, T, D], k, v [H, T, D] -> [Hq, T, Dv]."""
        group = q.shape[0] // k.shape[0]

        def probabilities(visible: Tensor) -> Tensor:
            seen = (visible & causal).repeat_interleave(group, 0)
            return logits(q, k, seen)

        p = probabilities(self.visible(layer, q, k, probabilities))
        return p @ v.repeat_interleave(group, 0)


def softmax_over(scale: float, softcap: float | None, sinks: Tensor | None):
    """A function (q, k, seen) -> probabilities [Hq, T, n] with a model's scale, softcap and attention sinks."""

    def probabilities(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        heads = torch.stack([q[h] @ k[h * k.shape[0] // q.shape[0]].T for h in range(q.shape[0])]) * scale
        if softcap:
            heads = torch.tanh(heads / softcap) * softcap
        heads = heads.masked_fill(~seen, -math.inf)
        if sinks is None:
            return heads.softmax(-1)
        column = sinks.double()[:, None, None].expand(-1, heads.shape[1], 1)
        return torch.cat([heads, column], -1).softmax(-1)[..., :-1]

    return probabilities


def dense_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **kwargs
):
    oracle = _active[-1]
    assert query.shape[0] == 1
    q, k, v = (x[0].double() for x in (query, key, value))
    tokens = q.shape[1]
    t = torch.arange(tokens)
    causal = t[None, :] <= t[:, None]
    if sliding_window is not None:
        causal = causal & (t[None, :] > t[:, None] - sliding_window)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    logits = softmax_over(scale, softcap, s_aux)
    out = oracle.attend(module.layer_idx, q, k, v, causal, logits)
    return out.transpose(0, 1)[None].to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, dense_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def layers_run_by(model, active):
    """Tokens skip layer i where ``active(i)`` [T] bool is False: the hidden state passes through unchanged."""
    handles = []
    if active is not None:
        for i, layer in enumerate(model.get_decoder().layers):

            def skip(module, args, kwargs, output, i=i):
                before = args[0] if args else kwargs["hidden_states"]
                runs = active(i)[None, :, None]
                if isinstance(output, tuple):
                    return (torch.where(runs, output[0], before), *output[1:])
                return torch.where(runs, output, before)

            handles.append(layer.register_forward_hook(skip, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def dense_logits(model, tokens: Tensor, oracle: Oracle, active=None) -> Tensor:
    """Logits [T, vocabulary] of an unwrapped model over ``tokens`` [1, T] with the oracle's attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _active.append(oracle)
    try:
        with layers_run_by(model, active):
            return model(tokens, use_cache=False).logits[0]
    finally:
        _active.pop()
        model.set_attn_implementation(before)


# -- oracles --------------------------------------------------------------------------------------------------------


class Replay(Oracle):
    """Query t sees what the log says was kept before step t, and itself.

    ``log[t][layer][head]``: positions held after the forward that ended with token t - 1; steps without a log (the
    prompt) are causal.
    """

    def __init__(self, log: dict[int, list[list[list[int]]]]) -> None:
        self.log = log

    def visible(self, layer, q, k, probabilities):
        seen = super().visible(layer, q, k, probabilities)
        for t, kept in self.log.items():
            if t < q.shape[1]:
                # One latent head (MLA) serves all heads.
                heads = kept[layer] if len(kept[layer]) > 1 else kept[layer] * seen.shape[0]
                for h, positions in enumerate(heads):
                    seen[h, t] = False
                    seen[h, t, [*positions, t]] = True
        return seen


class DistillOracle(Replay):
    """PromptDistill from its paper: ``stages`` (layer, tokens kept), in order; what a stage drops is not there behind
    its layer. Give ``dense_logits`` its :meth:`runs`. What the cache holds is replayed from the log."""

    def __init__(self, log, stages: list[tuple[int, int]], pool: int, prompt: int, total: int) -> None:
        super().__init__(log)
        self.stages, self.pool, self.prompt, self.total = stages, pool, prompt, total
        self.kept: dict[int, list[int]] = {}  # layer of a stage -> tokens of the prompt that go on
        self.gap = math.inf  # smallest distance between the last chosen and the first left out

    def on(self, layer: int) -> list[int]:
        """Tokens of the prompt that run ``layer``."""
        before = [r for r, _ in self.stages if r < layer]
        return self.kept[before[-1]] if before else list(range(self.prompt))

    def runs(self, layer: int) -> Tensor:
        runs = torch.ones(self.total, dtype=torch.bool)
        runs[: self.prompt] = False
        runs[self.on(layer)] = True
        return runs

    def visible(self, layer, q, k, probabilities):
        seen = super().visible(layer, q, k, probabilities)
        seen[:, : self.prompt] &= self.runs(layer)
        stages = dict(self.stages)
        if layer in stages:
            self.kept[layer] = self.choose(q, k, self.on(layer), stages[layer])
        return seen

    def choose(self, q: Tensor, k: Tensor, listed: list[int], keep: int) -> list[int]:
        last, earlier = listed[-1], listed[:-1]
        group, x = q.shape[0] // k.shape[0], []
        for j in earlier:
            x.append(sum(float(q[h, last] @ k[h // group, j]) for h in range(q.shape[0])) / q.shape[0])
        half = self.pool // 2
        s = [sum(x[max(i - half, 0) : i + half + 1]) / self.pool for i in range(len(x))]
        order = sorted(range(len(s)), key=lambda i: (-s[i], i))
        if len(order) > keep:
            self.gap = min(self.gap, s[order[keep - 1]] - s[order[keep]])
        return sorted([*(earlier[i] for i in order[:keep]), last])


class H2OOracle(Oracle):
    """H2O from its paper: scores are column sums of the attention over what survives; predicts the kept sets.

    ``active(layer)`` [T] bool: the tokens that run a layer (all, without a layer schedule).
    """

    def __init__(self, heavy: int, recent: int, prompt: int, group: str = "mean", active=None) -> None:
        self.heavy, self.recent, self.prompt, self.group, self.active = heavy, recent, prompt, group, active
        self.kept: dict[int, dict[int, list[list[int]]]] = {}  # layer -> t -> head -> positions after token t

    def visible(self, layer, q, k, probabilities):
        heads, tokens = k.shape[0], q.shape[1]
        runs = torch.ones(tokens, dtype=torch.bool) if self.active is None else self.active(layer)
        seen = super().visible(layer, q, k, probabilities) & runs
        scores = torch.zeros(heads, tokens, dtype=torch.float64)
        self.kept[layer] = {}

        def add(queries):
            p = probabilities(seen)[:, queries].view(heads, -1, len(queries), tokens)
            p = p[:, :, runs[queries]]
            scores.add_((p.mean(1) if self.group == "mean" else p.amax(1)).sum(1))

        survivors = [set(range(self.prompt)) & set(runs.nonzero()[:, 0].tolist()) for _ in range(heads)]
        add(list(range(self.prompt)))
        for t in range(self.prompt - 1, tokens):
            if t >= self.prompt:
                for h in range(heads):
                    seen[h, t] = False
                    if runs[t]:
                        survivors[h].add(t)
                    seen[h, t, sorted(survivors[h] | {t})] = True
                if runs[t]:
                    add([t])
            for h in range(heads):
                if len(survivors[h]) > self.heavy + self.recent:
                    newest = {p for p in survivors[h] if p > t - self.recent}
                    rest = sorted(survivors[h] - newest, key=lambda p: (-float(scores[h, p]), p))
                    # A schedule leaves holes in the window of recent positions; the budget is filled all the same.
                    survivors[h] = newest | set(rest[: self.heavy + self.recent - len(newest)])
            self.kept[layer][t] = [sorted(s) for s in survivors]
        return seen


class TokenSelectOracle(Oracle):
    """TokenSelect from its paper, with original positions: selects by the soft vote, reuses by cosine similarity."""

    def __init__(
        self,
        k,
        sinks,
        local,
        reuse,
        chunk,
        prompt,
        vote="soft",
        active=None,
        inverse_frequencies: Tensor | None = None,
        pool=1,
    ) -> None:
        if inverse_frequencies is not None:
            self.frequencies = torch.cat([inverse_frequencies, inverse_frequencies]).double()
        self.k, self.sinks, self.local, self.reuse = k, sinks, local, reuse
        self.chunk, self.prompt, self.vote, self.active = min(chunk, local), prompt, vote, active
        self.pool = pool
        self.read: dict[int, dict[int, list[int]]] = {}  # layer -> first query of the step -> positions read
        self.gap = math.inf  # smallest relative distance between the last chosen and the first left out

    def steps(self, tokens: int) -> list[range]:
        chunks = [range(a, min(a + self.chunk, self.prompt)) for a in range(0, self.prompt, self.chunk)]
        return chunks + [range(t, t + 1) for t in range(self.prompt, tokens)]

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions.double()[:, None] * self.frequencies
        half = x.shape[-1] // 2
        swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos() + swapped * angle.sin()

    def select(
        self, layer: int, query: Tensor, plain: Tensor, k: Tensor, step: range, memory: dict
    ) -> list[int] | None:
        """Positions that a step reads. query [Hq, D], by which steps are compared: plain [Hq, D]; k [H, T, D]."""
        end = step.stop
        if end <= self.sinks + self.k + self.local:
            return None
        if "query" in memory:
            a, b = plain.flatten(), memory["query"].flatten()
            fits = self.reuse <= -1 or (len(step) == 1 and end - memory["at"] <= self.local)
            if fits and float(a @ b / (a.norm() * b.norm())) >= self.reuse:
                memory["list"] = sorted({*memory["list"], *range(memory["end"], end)})
                memory["end"] = end
                return memory["list"]
        candidates = range(self.sinks, max(end - self.local, self.sinks))
        group = query.shape[0] // k.shape[0]
        score = torch.zeros(len(candidates), dtype=torch.float64)
        for h in range(query.shape[0]):
            raw = k[h // group, self.sinks : self.sinks + len(candidates)] @ query[h]
            if self.vote == "head":
                ranked = sorted(range(len(raw)), key=lambda i: (-float(raw[i]), i))
                score[ranked[: self.k]] += 1
                if len(ranked) > self.k:
                    last, out = float(raw[ranked[self.k - 1]]), float(raw[ranked[self.k]])
                    self.gap = min(self.gap, abs(last - out) / max(abs(last), 1e-9))
            else:
                score += raw.softmax(0) if self.vote == "soft" else raw
        beside = self.pool // 2
        score = torch.stack([score[max(i - beside, 0) : i + beside + 1].max() for i in range(len(score))])
        order = sorted(range(len(candidates)), key=lambda i: (-float(score[i]), i))
        best = order[: self.k]
        if len(order) > self.k and self.vote != "head" and self.pool == 1:  # else equal votes are usual
            last, out = float(score[order[self.k - 1]]), float(score[order[self.k]])
            self.gap = min(self.gap, (last - out) / abs(last))
        chosen = {self.sinks + i for i in best}
        read = sorted({*range(self.sinks), *chosen, *range(max(end - self.local, 0), end)})
        memory.update(query=plain, list=read, end=end, at=end)
        return read

    def visible(self, layer, q, k, probabilities):
        seen = super().visible(layer, q, k, probabilities)
        memory, self.read[layer] = {}, {}
        origin = self.turn(q, -torch.arange(q.shape[1]))
        for step in self.steps(q.shape[1]):
            query, plain = (x[:, step.start : step.stop].mean(1) for x in (q, origin))
            read = self.select(layer, query, plain, k, step, memory)
            if read is not None:
                seen[:, step.start : step.stop] = False
                seen[:, step.start : step.stop, read] = True
                self.read[layer][step.start] = read
        return seen


class QuestOracle(Oracle):
    """Quest from its paper: behind the prompt every head reads the pages with the largest bounds, and the newest one.

    Bounds of the query heads of a kv head are averaged. ``active(layer)`` [T] bool: the tokens that run a layer.
    """

    def __init__(self, k: int, dense_layers: int, prompt: int, page_size: int, active=None) -> None:
        self.pages, self.dense_layers, self.prompt = max(k // page_size, 1), dense_layers, prompt
        self.page_size, self.active = page_size, active
        self.gap = math.inf  # smallest distance between the last page that is read and the first that is not
        self.read: dict[tuple[int, int], list[list[int]]] = {}  # (layer, token) -> head -> positions

    def visible(self, layer, q, k, probabilities):
        heads, tokens = k.shape[0], q.shape[1]
        runs = torch.ones(tokens, dtype=torch.bool) if self.active is None else self.active(layer)
        seen = super().visible(layer, q, k, probabilities) & runs
        queries = q.unflatten(0, (heads, -1))
        for t in range(self.prompt if layer >= self.dense_layers else tokens, tokens):
            stored = [p for p in range(t + 1) if runs[p]]
            pages = [stored[i : i + self.page_size] for i in range(0, len(stored), self.page_size)]
            if not runs[t] or len(pages) <= self.pages:
                continue
            self.read[layer, t] = []
            for h in range(heads):
                bounds = []
                for page in pages[:-1]:
                    low, high = k[h, page].amin(0), k[h, page].amax(0)
                    of_heads = [sum(max(float(x * a), float(x * b)) for x, a, b in zip(row, low, high))
                                for row in queries[h, :, t]]  # fmt: skip
                    bounds.append(sum(of_heads) / len(of_heads))
                order = sorted(range(len(bounds)), key=lambda i: (-bounds[i], i))
                n = self.pages - 1
                if n:
                    self.gap = min(self.gap, bounds[order[n - 1]] - bounds[order[n]])
                read = sorted(p for i in [*order[:n], len(pages) - 1] for p in pages[i])
                self.read[layer, t].append(read)
                seen[h, t] = False
                seen[h, t, read] = True
        return seen


class CompactOracle(TokenSelectOracle):
    """TokenSelect with clipped compact positions: what is read is rotated by its index in the list."""

    def attend(self, layer, q, k, v, causal, logits):
        tokens = q.shape[1]
        raw_q, raw_k = self.turn(q, -torch.arange(tokens)), self.turn(k, -torch.arange(tokens))
        memory, self.read[layer] = {}, {}
        outs = []
        for step in self.steps(tokens):
            own = torch.arange(step.start, step.stop)
            part = raw_q[:, own]
            voting = self.turn(part, self.local + torch.arange(len(own))).mean(1)
            read = self.select(layer, voting, voting, raw_k, step, memory)
            self.read[layer][step.start] = read
            listed = torch.arange(step.stop) if read is None else torch.tensor(read)
            keys = self.turn(raw_k[:, listed], torch.arange(len(listed)))
            place = torch.arange(len(listed) - len(own), len(listed))
            seen = (listed[None, :] <= own[:, None]).expand(q.shape[0], -1, -1)
            p = logits(self.turn(part, place), keys, seen)
            outs.append(p @ v[:, listed].repeat_interleave(q.shape[0] // k.shape[0], 0))
        return torch.cat(outs, 1)
