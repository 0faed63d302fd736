"""What transformers sees of the layers of a cache: pages, transformers' own layers, and layers that are both."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicIndexedLayer, LinearAttentionLayer

from .tiers import LayerPlan

if TYPE_CHECKING:
    from .cache import KVCache


class PagedLayer(CacheLayerMixin):
    """What transformers sees of one layer; the entries are in ``KVCache.engine``."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: KVCache, index: int, window: int | None) -> None:
        super().__init__()
        self.attach(cache, index, window)

    def attach(self, cache: KVCache, index: int, window: int | None) -> None:
        # Weak: a cycle would keep the pages of a dropped cache until some garbage collection.
        self._cache = weakref.ref(cache)
        self.index = index
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    @property
    def cache(self) -> KVCache:
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def record_past(self) -> bool:
        return self.cache.engine.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:  # generate() ends speculation so
        self.cache.engine.recording = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.update(key_states, value_states, self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen_tokens

    def get_max_length(self) -> int:
        return -1


class RecurrentPagedLayer(LinearAttentionLayer, PagedLayer):
    """Pages for the attention of a layer that also keeps recurrent states (Falcon-H1, Zamba)."""

    is_compileable = False
    record_past = False  # its own: states are recorded by transformers' class, entries by the engine
    # crop() and reorder_cache() are those of the states.

    def __init__(self, cache: KVCache, index: int, window: int | None, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        self.is_initialized = False
        self.attach(cache, index, window)


class IndexedPagedLayer(PagedLayer):
    """Pages for a layer that selects by an indexer of its own (DeepSeek-V3.2), whose keys stay dense.

    crop() and reorder_cache() are those of the indexer's keys.
    """

    update_indexer = DynamicIndexedLayer.update_indexer
    lazy_initialization_indexer = DynamicIndexedLayer.lazy_initialization_indexer

    def __init__(self, cache: KVCache, index: int, window: int | None) -> None:
        super().__init__(cache, index, window)
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None
        self.is_indexer_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :tokens_to_remove]
        if tokens_to_remove and self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :tokens_to_remove]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys.index_select(0, beam_idx.to(self.indexer_keys.device))
        if self.indexer_position_ids is not None:
            there = beam_idx.to(self.indexer_position_ids.device)
            self.indexer_position_ids = self.indexer_position_ids.index_select(1, there)


def make_layer(cache: KVCache, plan: LayerPlan, index: int, window: int | None) -> Any:
    """The layer object for layer ``index`` of a plan."""
    template = plan.layers[index]
    recurrent = isinstance(template, LinearAttentionLayer)
    if plan.tiers[index] == "own":
        return type(template)(**({"number_of_states": template.number_of_states} if recurrent else {}))
    if isinstance(template, DynamicIndexedLayer):
        return IndexedPagedLayer(cache, index, window)
    if recurrent:
        return RecurrentPagedLayer(cache, index, window, template.number_of_states)
    return PagedLayer(cache, index, window)


def is_stateful(layer: Any) -> bool:
    """Whether a layer keeps something besides pages: recurrent states, keys of an indexer."""
    return isinstance(layer, (LinearAttentionLayer, IndexedPagedLayer))
