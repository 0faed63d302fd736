"""RKV: while decoding, keep what the newest queries attend to and nothing else says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .budget import FAR, Budget, check_count, check_pool, check_window
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView

#: Most cosines that are held at once.
AT_ONCE = 2**24


@dataclass(frozen=True)
class RKV(_Keeping):
    """Keep entries that the newest queries attend to and that are not redundant (R-KV, arXiv 2505.24133, section 3).

    Whenever ``buffer`` entries have come on top of ``keep``, a kv head keeps its ``keep`` best again, the newest
    ``window`` among them. The score of an entry is

        lam * attention - (1 - lam) * redundancy.

    Attention is what the newest ``window`` queries give to it in a softmax over all entries before them, with for each
    entry the largest logit of the kv head's query heads: the mean over these queries, then the largest of ``pool``
    neighbours by position. Redundancy is the softmax, over the head's entries, of the mean cosine of an entry's key
    with all others. Of several keys that are alike the most recent one is spared: for every entry, its cosine with the
    most recent other one where that is beyond ``threshold`` does not count for that one.

    Arguments
        keep: entries per kv head, more than ``window``: an int, a share of the prompt, or bytes.
        window: newest queries that vote, and newest entries that stay (paper: 8).
        lam: weight of attention in [0, 1] (paper: 0.07).
        buffer: decoded tokens from one eviction to the next, at least 1 (paper: 128); a head holds up to ``keep`` +
            ``buffer`` - 1 entries between steps. The end of a prompt always leaves ``keep``.
        pool: neighbours, the entry in the middle; odd (official code: 7).
        threshold: cosine from which two keys are alike (official code: 0.5).

    An eviction computes the cosines of all pairs of a head's entries: its time grows with the square of their number.
    Softcaps are not modelled. Models whose queries are not made for the cached keys (MLA) are refused at ``wrap``.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2505.24133, section 3",
        rule=(
            "`lam` · attention - (1 - `lam`) · redundancy: the softmax of the newest `window` queries, largest logit "
            "of the group, mean, largest of `pool` neighbours; and the softmax of a key's mean cosine with the "
            "others, of alike ones the most recent spared."
        ),
        holds="`keep`, and up to `buffer - 1` more; `window` queries per query head",
        cost="noting the query; the cosines of all pairs of keys, once in `buffer` steps",
        use="Long generations that repeat themselves, such as chains of thought.",
    )

    keep: Budget = 1024
    window: int = 8
    lam: float = 0.07
    buffer: int = 128
    pool: int = 7
    threshold: float = 0.5

    observes_generated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("buffer", self.buffer, 1)  # first: slack goes by it
        super().__post_init__()
        check_window(self.window, self.keep)
        check_pool(self.pool)
        for name, low in (("lam", 0), ("threshold", -1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 1:
                raise ValueError(f"{name} must be in [{low}, 1], got {value!r}")

    @property
    def slack(self) -> int:  # type: ignore[override]
        return self.buffer - 1

    def allocate_recent(self, layer: LayerView) -> Tensor:
        return self._resolve(self.keep, layer).clamp(min=1, max=self.window)

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        # The newest queries of each row, with their position + 1; 0: none.
        queries, places = self._newest(queries, positions + 1)
        state = layer.state
        if "queries" in state:
            first = torch.where(places > 0, places, FAR).amin(1, keepdim=True)
            old = torch.where(state["places"] < first, state["places"], 0)  # others were taken back
            queries, places = self._newest(torch.cat([state["queries"], queries], 2), torch.cat([old, places], 1))
        state.update(queries=queries, places=places)

    def _newest(self, queries: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        places, index = places.topk(min(self.window, places.shape[1]), dim=1)
        return queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])), places

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state  # queries know their positions: those beyond the newest token do not count

    def score(self, layer: LayerView) -> Tensor:
        keys, recent = layer.keys().float(), layer.recent
        assert recent is not None  # fixed before anything leaves
        width = keys.shape[2]
        slots = torch.arange(width, device=keys.device)
        positions = torch.where(slots < layer.counts[..., None], layer.positions[..., :width], FAR)
        positions, order = positions.sort(dim=2)
        keys = keys.gather(2, order[..., None].expand(keys.shape))
        end = (layer.tokens - recent)[:, None, None]
        attention = self._attention(layer, keys, positions.masked_fill(positions >= end, FAR))
        worth = self.lam * attention - (1 - self.lam) * self._redundancy(keys, positions < FAR)
        worth = torch.zeros_like(worth).scatter_(2, order, worth)
        return F.pad(worth, (0, layer.capacity - width))

    def _attention(self, layer: LayerView, keys: Tensor, positions: Tensor) -> Tensor:
        """What the newest queries give to keys [R, H, n, D] at ``positions`` [R, H, n], FAR: not to this one."""
        if "queries" not in layer.state:  # no token ran the layer
            return torch.zeros(keys.shape[:3], device=keys.device)
        places = layer.state["places"]
        places = torch.where(places <= layer.tokens[:, None], places, 0)  # others were taken back
        q = layer.state["queries"].float().unflatten(1, (layer.heads, -1))
        seen = positions[:, :, None] < places[:, None, :, None]  # [R, H, W, n]
        logits = (q @ keys[:, :, None].transpose(3, 4)).amax(2) * layer.scale
        given = logits.masked_fill(~seen, float("-inf")).softmax(3).nan_to_num()  # NaN: a query that sees none
        mean = given.sum(2) / (places > 0).sum(1).clamp(min=1)[:, None, None]
        return F.max_pool1d(mean, self.pool, stride=1, padding=self.pool // 2)

    def _redundancy(self, keys: Tensor, live: Tensor) -> Tensor:
        """How much keys [R, H, n, D], in the order of their positions, are like the others that are ``live``."""
        count = live.sum(2, keepdim=True)
        unit = F.normalize(keys, dim=3).masked_fill(~live[..., None], 0.0)
        total = (unit @ unit.sum(2)[..., None])[..., 0] - (unit * unit).sum(3)
        rows, heads, n = live.shape
        for part in torch.arange(n, device=keys.device).split(max(AT_ONCE // (rows * heads * n), 1)):
            cosine = unit[:, :, part] @ unit.transpose(2, 3)
            cosine[:, :, part - part[0], part] = -2.0  # itself
            alike = (cosine > self.threshold) & live[:, :, None]
            latest = torch.where(alike, torch.arange(n, device=keys.device), -1).amax(3, keepdim=True)
            spared = torch.where(latest >= 0, cosine.gather(3, latest.clamp(min=0)), 0.0)
            total = total.scatter_add(2, latest[..., 0].clamp(min=0), -spared[..., 0])
        return (total / count).masked_fill(~live, float("-inf")).softmax(2)
