"""ExpectedAttention: keep what queries like those of the prompt will attend to."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget, check_count
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class ExpectedAttention(_Keeping):
    """Keep the entries with the largest attention expected from the next queries, times ||v|| (arXiv 2510.00636;
    kvpress's ExpectedAttentionPress).

    The prompt's queries of a query head, without their rotation, are taken for samples of a normal distribution with
    mean m and covariance C. Turned by R, the mean of the rotations to the next ``horizon`` positions, a query gives key
    k in expectation the weight

        z = exp(a k.Rm + a^2 k.(R C R^T)k / 2),    a the model's factor of the logits (1 / sqrt(D)),

    and the score of an entry is ||v|| times the mean over the kv head's query heads of z, normalised over the entries.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        horizon: positions ahead of the newest token over which the rotation is averaged.
        sinks: first entries that stay; they are outliers, and neither their queries nor their keys count otherwise.
        recent: newest entries that stay, part of ``keep`` like the sinks (source: none).
        slack: entries by which a head may exceed ``keep`` while decoding before it is brought back to it, as an
            eviction reads all keys and values of the layer. With 0 every step evicts, and none is captured as a graph.

    The statistics of every prompt of a conversation count, and stay as they are while decoding; they take D^2 + D
    numbers per query head, row and layer. The source computes them from hidden states, which leaves out models that
    normalise queries; here they are those of the queries themselves. Softcaps are not modelled. Models whose rotation
    is not known, or whose queries are not made for the cached keys (MLA), are refused at ``wrap``.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2510.00636; kvpress",
        rule=(
            "z = exp(a k·Rm + a² k·(R C Rᵀ)k / 2) for queries of mean m and covariance C, turned by the mean rotation "
            "R to the next `horizon` positions; normalised, group mean, times ‖v‖."
        ),
        holds="`keep`, and up to `slack` more; D² + D numbers per query head",
        cost="reading all keys and values, once in `slack + 1` steps",
        use="The question is not known yet; set `slack`.",
    )

    keep: Budget = 0.2
    horizon: int = 512
    sinks: int = 4
    _: KW_ONLY
    recent: Budget = 0
    slack: int = 0

    needs_rotation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("horizon", self.horizon, 1)

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        counts = (positions >= self.sinks)[:, None, :, None]
        q = layer.without_rotation(queries, positions).float() * layer.scale
        new = counts.sum(2).float()  # [rows, 1, 1]
        mean = torch.where(counts, q, 0.0).sum(2) / new.clamp(min=1)
        centred = torch.where(counts, q - mean[:, :, None], 0.0)
        scatter = centred.transpose(2, 3) @ centred
        state = layer.state
        if "mean" in state:  # of two parts as of one: Chan, Golub and LeVeque (1979), without cancellation
            old = state["queries"][:, None, None]
            total = (old + new).clamp(min=1)
            step = mean - state["mean"]
            scatter = scatter + state["scatter"] + step[..., None] * step[..., None, :] * (old * new / total)[..., None]
            mean = state["mean"] + step * (new / total)
            new = old + new
        state.update(queries=new[:, 0, 0], mean=mean, scatter=scatter)

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state  # queries that were taken back go on counting: nobody knows any more which they were

    def score(self, layer: LayerView) -> Tensor:
        keys, norms = layer.keys().float(), torch.linalg.vector_norm(layer.values(), dim=-1, dtype=torch.float32)
        width, slots = keys.shape[2], torch.arange(keys.shape[2], device=keys.device)
        free = (slots < layer.counts[..., None]) & (layer.positions[..., :width] >= self.sinks)
        if "mean" not in layer.state:  # no token of a prompt ran the layer
            return torch.nn.functional.pad(norms, (0, layer.capacity - width))
        ahead = layer.tokens[:, None] + torch.arange(self.horizon, device=keys.device)
        keys = layer.turned_back(keys, ahead)  # R^T k, instead of R m and R C R^T
        by_group = (layer.rows, layer.heads, layer.group)
        mean = layer.state["mean"].view(*by_group, -1)
        covariance = layer.state["scatter"] / layer.state["queries"].clamp(min=1)[:, None, None, None]
        covariance = covariance.view(*by_group, *covariance.shape[2:])
        total = torch.zeros_like(norms)
        for g in range(layer.group):
            logits = (keys @ mean[:, :, g, :, None])[..., 0] + ((keys @ covariance[:, :, g]) * keys).sum(-1) / 2
            total += torch.where(free, logits, float("-inf")).softmax(-1).nan_to_num()  # NaN: nothing but sinks
        return torch.nn.functional.pad(total / layer.group * norms, (0, layer.capacity - width))
