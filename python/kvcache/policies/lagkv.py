"""LagKV: keep the entries that stand out from the tokens right after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .budget import Budget, check_count
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class LagKV(_Keeping):
    """Keep the best of every ``lag`` tokens, seen from the ``lag`` tokens that follow them (arXiv 2504.04704).

    Behind the first ``sinks`` tokens every ``lag`` consecutive ones are a partition. Once the next partition is
    complete, its smallest and largest value low_d and high_d of every channel are the reference:

        s_i = softmax over the partition of std over d of (x_id - low_d) / (high_d - low_d),

    for keys (as the model rotated them) and for values; the score is the mean of both. From each partition those of
    the highest score stay, as many from one as from another. Sinks stay, and so does the tail that has no complete
    reference yet, between ``lag`` and 2 ``lag`` - 1 tokens.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes. The least is what may not leave, ``sinks`` +
            2 ``lag`` - 1 entries: an int below is refused, a share or bytes below mean that.
        sinks, lag: see above.

    What the paper leaves open. The standard deviation is the unbiased one; a channel in which the reference does not
    vary counts as 0. A partition's order is fixed when its reference is complete, the budget when the prompt ends: the
    more partitions there are, the fewer entries of each stay. While decoding a head exceeds ``keep`` by ``lag`` - 1 at
    most and is brought back to it when another partition has its reference (``slack``).
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2504.04704",
        rule=(
            "softmax over a partition of `lag` tokens of std_D((x - min) / (max - min)), minima and maxima those of "
            "the next partition, mean over keys and values; the best of each partition stay, the first `sinks`, the "
            "last `lag` to 2 `lag` - 1."
        ),
        holds="`keep`, and up to `lag - 1` more",
        cost="reading a partition's keys and values, once in `lag` steps",
        use="Without attention and queries, where every part of the text should keep its share.",
    )

    keep: Budget = 0.2
    sinks: int = 4
    lag: int = 128

    columns: ClassVar[tuple[str, ...]] = ("place",)

    def __post_init__(self) -> None:
        check_count("lag", self.lag, 2)  # first: slack goes by it
        super().__post_init__()
        if isinstance(self.keep, int) and self.keep < self._least:
            raise ValueError(f"keep must be at least sinks + 2 * lag - 1 = {self._least} tokens, got {self.keep}")

    @property
    def _least(self) -> int:
        return self.sinks + 2 * self.lag - 1

    @property
    def slack(self) -> int:  # type: ignore[override]
        return self.lag - 1

    def allocate(self, layer: LayerView) -> Tensor:
        return self._resolve(self.keep, layer).clamp(min=self._least)

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        # The place of an entry in its partition, 0 the best; -1: no reference yet.
        return {"place": keys.new_full(keys.shape[:3], -1.0, dtype=torch.float32)}

    def score(self, layer: LayerView) -> Tensor:
        place = layer.column("place")
        keys = layer.keys()
        width = keys.shape[2]
        live = torch.arange(width, device=place.device) < layer.counts[..., None]
        partition = (layer.positions[..., :width] - self.sinks).div(self.lag, rounding_mode="floor")
        complete = (layer.tokens - self.sinks).div(self.lag, rounding_mode="floor")[:, None, None]
        # Bucket 0 holds what no partition holds; the partition behind the last complete one is nobody's reference.
        bucket = torch.where(live & (partition >= 0) & (partition < complete), partition + 1, 0).long()
        new = live & (bucket > 0) & (partition < complete - 1) & (place[..., :width] < 0)
        if bool(new.any()):
            buckets = int(bucket.max()) + 1
            worth = sum(_spread(x.float(), bucket, buckets, new) for x in (keys, layer.values()))
            assert isinstance(worth, Tensor)
            rank = _ranks(worth, layer.positions[..., :width], torch.where(new, bucket, 0))
            place[..., :width] = torch.where(new, rank, place[..., :width])
        return torch.where(place < 0, 1.0, -place)


def _spread(x: Tensor, bucket: Tensor, buckets: int, new: Tensor) -> Tensor:
    """The softmax within each partition of how unevenly an entry lies over its reference, [R, H, n] float32.

    x [R, H, n, D]; bucket [R, H, n] int64: the partition; new [R, H, n] bool: who is asked for.
    """
    rows, heads, _, dim = x.shape
    where = bucket[..., None].expand(x.shape)
    bounds = []
    for sign in (1, -1):  # the largest of x, and of -x
        empty = x.new_full((rows, heads, buckets + 1, dim), float("-inf"))
        bounds.append(empty.scatter_reduce(2, where, sign * x, "amax"))
    # An entry's reference is the next bucket; there is one more than partitions, for those that ask for nothing.
    high, negative_low = (b.gather(2, where + 1) for b in bounds)
    span = high + negative_low
    spread = torch.where(span > 0, (x + negative_low) / span, 0.0).std(-1)  # -inf: a reference without entries
    spread = torch.where(new, spread, float("-inf"))
    group = torch.where(new, bucket, 0)
    most = spread.new_full((rows, heads, buckets), float("-inf")).scatter_reduce(2, group, spread, "amax")
    weight = torch.where(new, torch.exp(spread - most.gather(2, group)), 0.0)
    total = torch.zeros_like(most).scatter_add(2, group, weight)
    return torch.where(new, weight / total.gather(2, group), 0.0)


def _ranks(worth: Tensor, positions: Tensor, bucket: Tensor) -> Tensor:
    """The place of every entry within its bucket by falling ``worth``, ties to the lowest position; float32."""
    order = torch.argsort(positions, dim=-1, stable=True)
    for key, falling in ((worth, True), (bucket, False)):
        order = order.gather(-1, torch.argsort(key.gather(-1, order), dim=-1, descending=falling, stable=True))
    sizes = torch.zeros(*bucket.shape[:2], int(bucket.max()) + 1, dtype=torch.long, device=bucket.device)
    sizes.scatter_add_(2, bucket, torch.ones_like(bucket))
    start = (sizes.cumsum(2) - sizes).gather(2, bucket)
    index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return (torch.empty_like(order).scatter_(2, order, index) - start).float()
