"""Quest: read only the pages whose keys may matter to the query, evict nothing."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .axes import Selection
from .base import Policy
from .budget import check_count
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class Quest(Policy):
    """Every decode step of every kv head reads the pages of ``k`` tokens that its query may attend to most (arXiv
    2406.10774, Algorithm 1).

    Beside each page lie the smallest and the largest value that its keys have in each channel. No key of the page has a
    larger dot product with query q than

        sum over d of max(q_d min_d, q_d max_d),

    and the pages with the largest bounds are read, the newest page always. Nothing is evicted: time is saved, not
    memory. Prompts read everything.

    Arguments
        k: tokens of the pages that a head reads, the newest page among them: ``k`` // page_size pages, at least one.
            The page size is that of ``wrap`` (paper: 16).
        dense_layers: first layers that read everything, as attention there is hardly sparse (paper: 2).

    What the paper, whose models have a kv head per query head, leaves open: the query heads of a group choose together,
    by the mean of their bounds, for pages are read once per kv head. Layers with a sliding window read their window.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2406.10774, Algorithm 1",
        rule=(
            "score of a page = Σ_d max(q_d min_d, q_d max_d), mean over a kv head's group; each kv head reads the "
            "pages of `k` tokens with the largest scores, the newest page always; everything in prompts and in the "
            "first `dense_layers` layers."
        ),
        holds="every token, and two bounds per page",
        cost="reading the bounds of all pages",
        use="Long contexts that must stay retrievable, heads for themselves: time is saved, memory is not.",
    )

    k: int = 2048
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)
        check_count("dense_layers", self.dense_layers)

    @property
    def page_bounds(self) -> bool:
        return True

    @property
    def selects_in_prompts(self) -> bool:
        return False

    @property
    def prefill_chunk(self) -> int:
        return 1  # drafts: each query chooses for itself, as it would alone

    def _pages(self, layer: LayerView) -> int:
        return max(self.k // layer.page_size, 1)

    def select(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection | None:
        pages = self._pages(layer)
        if layer.index < self.dense_layers or layer.most_entries <= pages * layer.page_size:
            return None
        at = positions[:, 0]
        # A row that brings nothing here (padding, a layer that it skips) reads as its newest token did.
        return layer.choose_pages(queries[:, :, 0], pages, torch.where(at >= 0, at, layer.tokens - 1))

    def phase(self, layer: LayerView) -> Hashable:
        pages = self._pages(layer)
        reads_all = layer.most_entries < pages * layer.page_size  # with the token of the step
        return "all" if layer.index < self.dense_layers or reads_all else "pages"
