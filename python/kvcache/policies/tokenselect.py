"""TokenSelect: read only the tokens that the heads vote for, evict nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import selection_cache
from .axes import Selection
from .base import Policy
from .budget import FAR, check_count, check_pool
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class TokenSelect(Policy):
    """Every step of every layer reads the first ``sinks`` tokens, the ``k`` best voted ones and the last ``local``.

    Source: arXiv 2411.02886 (EMNLP 2025), section 4. Each query head takes the softmax of its dot products with the
    candidate keys, without the usual 1/sqrt(D), and the heads' probabilities are summed (soft vote, Eq. 7). Heads of
    a group score their own kv head (h // group). The Selection Cache (Algorithm 1) keeps a layer's selection while
    the cosine similarity of the new query with the one that made it, both without their rotation (the paper rotates all
    of them to one place), is at least ``reuse``; tokens that left the local window meanwhile stay readable until the
    next selection, which comes after ``local`` tokens at the latest.

    Arguments
        k, sinks, local: tokens read (paper: 2048, 128, 512); a row with no more than their sum reads everything.
        reuse: threshold of the Selection Cache; above 1 every step selects anew, -1 selects once and for all. Chunks
            of a prompt always select.
        positions: "original" reads keys as rotated by the model; "compact" stores keys unrotated and rotates the
            entries read, and the queries, by their place in the reading list, which keeps all positions below
            sinks + k + local and so works beyond the trained context (the paper's way).
        chunk: queries per selection while a prompt is read; the chunk's mean query votes (paper: 512, at most
            ``local``).
        vote: "soft" (Eq. 7); "raw": the sum of logits (Eq. 5), or "head": the number of query heads among whose ``k``
            best a token is (Eq. 6), the paper's ablations.
        pool: a token's votes are the largest of those of ``pool`` neighbours around it; odd. The official code sets it
            for each data set, which the paper does not say. With it, or with "head", a decode step is no single op
            and is not captured as a graph.
        shortlist: None: every token votes. Else a selection looks only at the pages whose keys can have the largest
            logits, known from the bounds of each page (Quest, arXiv 2406.10774): that many pages beside those of
            ``sinks`` and ``local``, or that share (a float) of all that the cache has room for; never less than ``k``
            takes. Reads a fraction of the keys, and may miss some of the ``k`` best: bench/kernels/selection.py.

    A decode step is one op, :func:`kvcache.ops.select_tokens`, which asks nobody: whether a row reuses its selection is
    decided where the query is. Only ranks that share the heads of a layer must talk to each other first.

    Layers with a sliding window read their window and are not selected from.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2411.02886, section 4",
        rule=(
            "score_j = Σ_h softmax_j(q_h K); the first `sinks`, the `k` best and the last `local` are read; a "
            "selection is kept while the query's cosine is at least `reuse`."
        ),
        holds="every token",
        cost="a pass over all keys (over bounds and `shortlist` pages) at each selection",
        use="Long contexts that must stay retrievable: time is saved, memory is not.",
    )

    k: int = 2048
    sinks: int = 128
    local: int = 512
    reuse: float = 0.9
    _: KW_ONLY
    positions: str = "original"
    chunk: int = 512
    vote: str = "soft"
    shortlist: int | float | None = None
    pool: int = 1

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)
        check_count("sinks", self.sinks)
        check_count("local", self.local, 1)
        check_count("chunk", self.chunk, 1)
        if isinstance(self.reuse, bool) or not isinstance(self.reuse, (int, float)) or self.reuse != self.reuse:
            raise ValueError(f"reuse must be a number, got {self.reuse!r}")
        if self.positions not in ("original", "compact"):
            raise ValueError(f"positions must be 'original' or 'compact', got {self.positions!r}")
        if self.vote not in ("soft", "raw", "head"):
            raise ValueError(f"vote must be 'soft', 'raw' or 'head', got {self.vote!r}")
        check_pool(self.pool, "a token")
        pages = self.shortlist
        if pages is not None and not self._one_op:
            raise ValueError(
                f"shortlist needs vote='soft' or 'raw' and pool=1, got vote={self.vote!r}, pool={self.pool}"
            )
        if pages is not None and (
            isinstance(pages, bool)
            or not isinstance(pages, (int, float))
            or not (pages >= 1 if isinstance(pages, int) else 0 < pages <= 1)
        ):
            raise ValueError(f"shortlist must be None, a number of pages or a share in (0, 1], got {pages!r}")

    @property
    def prefill_chunk(self) -> int:
        # The chunk itself must lie in the local window, or its queries would not read their own neighbours.
        return min(self.chunk, self.local)

    @property
    def query_place(self) -> int:
        return self.local

    @property
    def page_bounds(self) -> bool:
        return self.shortlist is not None

    @property
    def _one_op(self) -> bool:
        """Whether ops.select_tokens can make the selection."""
        return self.vote != "head" and self.pool == 1

    @property
    def _most(self) -> int:
        """What a row may hold and still read all of it."""
        return self.sinks + self.k + self.local

    def _pages(self, layer: LayerView) -> int:
        """Pages that a selection may look at, those of the protected entries among them; 0: all."""
        if self.shortlist is None:
            return 0
        size = layer.page_size
        asked = (
            math.ceil(self.shortlist * layer.capacity / size) if isinstance(self.shortlist, float) else self.shortlist
        )
        protected = -(-self.sinks // size) + -(-self.local // size) + 1
        return protected + max(asked, -(-self.k // size))

    def select(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection | None:
        state = layer.state
        if "index" not in state and layer.most_entries <= self._most:
            return None
        if layer.decodes and "index" in state and not layer.sharded and self._one_op:
            return self._step(layer, queries, positions)
        end = positions.amax(1) + 1
        asks = end > 0  # the other rows bring nothing but padding here: they change nothing and read what they have
        held = layer.entries_before(torch.where(asks, end, FAR))
        # A row with no more than this reads all of it, also beside longer rows, and selects later.
        small = ~asks | (held <= self._most)
        if "index" not in state and bool(small.all()):
            return None
        real = (positions >= 0).to(queries.dtype)[:, None, :, None]
        query, plain = (
            (x * real).sum(2) / real.sum(2).clamp(min=1) for x in (queries, layer.without_rotation(queries, positions))
        )
        if "index" not in state:
            state.update(selection_cache.opened(plain, self._most + self.local))
        similarity = layer.similarity(plain, state["query"])
        asked = (positions >= 0).sum(1)  # of each row: padding beside a short prompt must not count
        stale = ~small & ((state["at"] <= 0) | (similarity < self.reuse))
        if self.reuse > -1.0:  # else "select once"
            # However similar the queries, the list would outgrow what a step may read: the mean queries of chunks of a
            # prompt are all alike, and a list gains every token that leaves the window.
            stale |= ~small & ((held - state["at"] > self.local) | (asked > 1))
        layer.count("selections", int(stale.sum()))
        layer.count("reuses", int((~small & ~stale).sum()))
        kept = selection_cache.extend(state, torch.where(asks | (state["at"] <= 0), held, state["until"]), self.local)
        if not bool(stale.any()):
            return kept
        fresh = layer.choose(
            query,
            self.k,
            torch.full_like(end, self.sinks),
            (end - self.local).clamp(min=self.sinks),
            end,
            kept.index.shape[2],
            vote=self.vote,
            pool=self.pool,
            shortlist=self._pages(layer),
        )
        return selection_cache.renew(state, stale, plain, fresh, held)

    def phase(self, layer: LayerView) -> Hashable:
        if layer.sharded or self.positions == "compact" or not self._one_op:
            return None
        reads_all = "index" not in layer.state and layer.most_entries < self._most  # with the token of the step
        return "all" if reads_all else None if "index" not in layer.state else "selected"

    def _step(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection:
        """One query per row: what :meth:`select` does, in one op that asks nobody."""
        state = layer.state
        width = self._most + self.local if self.reuse > -1.0 else max(self._most, layer.capacity)
        if state["index"].shape[2] < width:
            state["index"] = selection_cache.widen(state["index"], width)
        return layer.select_tokens(
            queries[:, :, 0],
            positions[:, 0].contiguous(),
            state,
            sinks=self.sinks,
            k=self.k,
            local=self.local,
            reuse=self.reuse,
            soft=self.vote == "soft",
            shortlist=self._pages(layer),
        )
