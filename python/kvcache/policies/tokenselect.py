"""TokenSelect: read only the tokens that the heads vote for, evict nothing."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Policy, Selection
from .budget import check_count

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
        vote: "soft" (Eq. 7) or "raw" (sum of logits, Eq. 5, the paper's ablation).

    Layers with a sliding window read their window and are not selected from.
    """

    k: int = 2048
    sinks: int = 128
    local: int = 512
    reuse: float = 0.9
    _: KW_ONLY
    positions: str = "original"
    chunk: int = 512
    vote: str = "soft"

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)
        check_count("sinks", self.sinks)
        check_count("local", self.local, 1)
        check_count("chunk", self.chunk, 1)
        if isinstance(self.reuse, bool) or not isinstance(self.reuse, (int, float)) or self.reuse != self.reuse:
            raise ValueError(f"reuse must be a number, got {self.reuse!r}")
        if self.positions not in ("original", "compact"):
            raise ValueError(f"positions must be 'original' or 'compact', got {self.positions!r}")
        if self.vote not in ("soft", "raw"):
            raise ValueError(f"vote must be 'soft' or 'raw', got {self.vote!r}")

    @property
    def prefill_chunk(self) -> int:
        # The chunk itself must lie in the local window, or its queries would not read their own neighbours.
        return min(self.chunk, self.local)

    @property
    def query_place(self) -> int:
        return self.local

    def select(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection | None:
        state = layer.state
        end = positions.amax(1) + 1
        if queries.shape[2] == 1 and state.get("steady") and int(end.min()) > 0:
            return self._decode(layer, queries, positions, end)
        asks = end > 0  # the other rows bring nothing but padding here: they change nothing and read what they have
        held = layer.entries_before(torch.where(asks, end, torch.iinfo(torch.int32).max))
        # A row with no more than this reads all of it, also beside longer rows, and selects later.
        small = ~asks | (held <= self.sinks + self.k + self.local)
        if "made" not in state and bool(small.all()):
            return None
        real = (positions >= 0).to(queries.dtype)[:, None, :, None]
        query, plain = (
            (x * real).sum(2) / real.sum(2).clamp(min=1) for x in (queries, layer.without_rotation(queries, positions))
        )
        if "made" not in state:
            rows = len(end)
            index = torch.full((rows, 1, self.sinks + self.k + self.local), -1, dtype=torch.int32, device=end.device)
            nothing = torch.zeros(rows, dtype=torch.int32, device=end.device)
            state.update(
                made=nothing.bool(),
                query=torch.zeros_like(plain),
                index=index,
                counts=nothing[:, None],
                until=nothing,
                at=nothing,
            )
        similarity = layer.similarity(plain, state["query"])
        asked = (positions >= 0).sum(1)  # of each row: padding beside a short prompt must not count
        stale = ~small & (~state["made"] | (similarity < self.reuse) | self._expired(held, state, asked))
        layer.count("selections", int(stale.sum()))
        layer.count("reuses", int((~small & ~stale).sum()))
        kept = self._extend(layer, torch.where(asks | ~state["made"], held, state["until"]))
        chosen = self._select(layer, query, plain, end, held, stale, kept) if bool(stale.any()) else kept
        state["steady"] = bool(state["made"].all())
        return chosen

    def _decode(self, layer: LayerView, queries: Tensor, positions: Tensor, end: Tensor) -> Selection:
        """One query per row, every row with a selection: what :meth:`select` does, in few operations."""
        state, rows, held = layer.state, len(end), layer.entries_before(end)
        query, plain = queries[:, :, 0], layer.without_rotation(queries, positions)[:, :, 0]
        similarity = layer.similarity(plain, state["query"])
        if float(similarity.max()) < self.reuse:
            layer.count("selections", rows)
            fresh = self._fresh(layer, query, end)
            state.update(query=plain, index=fresh.index, counts=fresh.counts, until=held, at=held)
            return fresh
        stale = (similarity < self.reuse) | self._expired(held, state, 1)
        if not bool(stale.any()):
            layer.count("reuses", rows)
            return self._extend(layer, held)
        layer.count("selections", int(stale.sum()))
        layer.count("reuses", int((~stale).sum()))
        return self._select(layer, query, plain, end, held, stale, self._extend(layer, held))

    def _expired(self, held: Tensor, state: dict, asked: Tensor | int) -> Tensor:
        """Which rows must select anew however similar the queries: the list would outgrow what a step may read.

        The mean queries of chunks of a prompt are all alike, and a list gains every token that leaves the window.
        """
        if self.reuse <= -1.0:  # "select once"
            return torch.zeros_like(state["made"])
        return (held - state["at"] > self.local) | (asked > 1)

    def _fresh(self, layer: LayerView, query: Tensor, end: Tensor) -> Selection:
        """The vote of ``query`` [rows, query_heads, D] over the entries before ``end`` [rows]."""
        first = torch.full_like(end, self.sinks)
        local = (end - self.local).clamp(min=self.sinks)
        scores = layer.vote(query, first, local, soft=self.vote == "soft")
        k = torch.full((len(end), 1), self.k, dtype=torch.int32, device=end.device)
        return layer.top(scores, k, first, local, end, width=self.sinks + self.k + self.local)

    def _select(
        self,
        layer: LayerView,
        query: Tensor,
        plain: Tensor,
        end: Tensor,
        held: Tensor,
        stale: Tensor,
        kept: Selection,
    ) -> Selection:
        """Select anew for the ``stale`` rows; the others keep ``kept``. ``plain``: ``query`` without its rotation."""
        state, fresh = layer.state, self._fresh(layer, query, end)
        width = max(kept.index.shape[2], fresh.index.shape[2])
        index = torch.where(stale[:, None, None], _widen(fresh.index, width), _widen(kept.index, width))
        counts = torch.where(stale[:, None], fresh.counts, kept.counts)
        state.update(
            made=state["made"] | stale,
            query=torch.where(stale[:, None, None], plain, state["query"]),
            index=index,
            counts=counts,
            until=torch.where(stale, held, state["until"]),
            at=torch.where(stale, held, state["at"]),
        )
        return Selection(index, counts)

    def _extend(self, layer: LayerView, end: Tensor) -> Selection:
        """The list of each row and every entry that came since, up to slot ``end`` [rows]."""
        state = layer.state
        index, counts, until = state["index"], state["counts"], state["until"]
        fresh = int((end - until).max())
        need = int(counts.max()) + max(fresh, 0)
        if need > index.shape[2]:
            index = _widen(index, need + self.local)
        if fresh > 0:
            step = torch.arange(fresh, dtype=torch.int32, device=end.device)[None]
            new = step < (end - until)[:, None]
            place = torch.where(new, counts + step, index.shape[2] - 1).long()
            slots = torch.where(new, until[:, None] + step, index[:, 0].gather(1, place))
            index[:, 0].scatter_(1, place, slots)
            counts = counts + (end - until).clamp(min=0)[:, None]
        state.update(index=index, counts=counts, until=torch.maximum(end, until))
        return Selection(index, counts)


def _widen(index: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(index, (0, width - index.shape[2]), value=-1)
