"""KNorm: keep the keys of smallest norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .budget import Budget
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class KNorm(_Keeping):
    """Keep the entries whose keys have the smallest norm (arXiv 2406.11430): score = -||k||.

    Attention tends to go to keys of small norm, so the norm stands for what H2O measures, at no cost: it is taken once,
    when the token is stored, from the key as the layer stores it (a rotation does not change it; with latent attention
    it is the norm of the latent), and kept beside the entry.

    Arguments
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        sinks, recent: first and newest entries that stay whatever their norm, part of ``keep`` (paper: none).
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2406.11430",
        rule="The `keep` keys of smallest norm stay.",
        holds="`keep`",
        cost="one norm per new token, choosing one victim per head",
        use="Models without normalised keys, when nothing may look at attention.",
    )

    keep: Budget = 0.2
    sinks: int = 0
    recent: Budget = 0

    columns: ClassVar[tuple[str, ...]] = ("negative_norm",)

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        return {"negative_norm": -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)}

    def score(self, layer: LayerView) -> Tensor:
        return layer.column("negative_norm")  # as it lies there: a decode step computes nothing
