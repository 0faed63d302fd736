"""TRIM-KV: learned gates say how long each token is worth remembering."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..gates import Gates
from .adakv import share_out
from .budget import Budget
from .card import Card
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView

ALLOCATIONS = ("head", "global")


@dataclass(frozen=True)
class TrimKV(_Keeping):
    """Keep the entries that trained gates remember best (TRIM-KV, arXiv 2512.03324, section 4).

    A gate of every layer sees the hidden states that enter attention and gives each token a beta in (0, 1) per kv
    head, stored beside the entry as log beta. After ``t`` tokens an entry at position i has beta ** (t - i) left, and
    those with the least leave first: score = (t - i) log beta. Rankings change with time, for what fades slowly
    overtakes what was newer: scores are computed anew at every eviction. Attention itself is the ordinary one, over
    what is kept.

    Arguments
        gates: the file that ``kvcache train-gates`` wrote for the model (or a folder with a ``gates.safetensors``), or
            :class:`kvcache.Gates`. In the text form: the file; gates that were never saved have none.
        keep: entries per kv head: an int, a share of the prompt, or bytes (the paper's M, 256 to 4096 there).
        slack: entries by which a head may exceed ``keep`` while decoding, before it is brought back to it (the
            paper's buffer of 128).
        sinks, recent: first and newest entries that stay whatever their gate says, part of ``keep`` (paper: none).
        allocation: "head": ``keep`` for every head; "global": the best ``keep`` x layers x heads of all layers and
            heads together, chosen anew at every eviction, so that heads which remember much take from those which do
            not. Layers with a sliding window have ``keep`` each then, and take no part.
        floor: with "global": share in [0, 1] of ``keep`` that every head has for sure, rounded down, and one entry at
            least. 1 is "head". The total stays exact.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2512.03324, section 4",
        rule="(t - i) log β_i, β_i = σ(W₂ SiLU(W₁ h_i + b₁) + b₀) of what enters attention at position i, a trained "
        "gate per layer with one β per kv head: the `keep` largest stay, of a head or of all together.",
        holds='`keep`, and up to `slack` more; with `allocation="global"` on average over layers and heads',
        cost="two small matrices per layer and new token; choosing what leaves, once in `slack + 1` steps",
        use="Models whose gates were trained (`kvcache train-gates`). The question need not be known yet.",
    )

    gates: Gates | str | None = None
    keep: Budget = 1024
    slack: int = 128
    _: KW_ONLY
    sinks: int = 0
    recent: Budget = 0
    allocation: str = "head"
    floor: float = 0.0

    needs_hidden: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("log_beta",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, got {self.allocation!r}")
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be a share in [0, 1], got {self.floor!r}")
        gates = self.gates
        if isinstance(gates, (str, os.PathLike)):
            object.__setattr__(self, "gates", os.fspath(gates))
            gates = Gates.load(gates)
        elif not (gates is None or isinstance(gates, Gates)):
            raise TypeError(f"gates must be the path of a file of gates or kvcache.Gates, got {gates!r}")
        object.__setattr__(self, "_gates", gates)

    @property
    def _loaded(self) -> Gates:
        gates: Gates | None = self._gates  # type: ignore[attr-defined]
        if gates is None:
            raise ValueError(f"{self}: gates must name a file of gates for this model; kvcache train-gates makes one")
        return gates

    @property
    def reallocates(self) -> bool:  # type: ignore[override]
        return self.allocation == "global"

    def check_hidden(self, layers: Sequence[int], hidden_size: int | None) -> None:
        try:
            self._loaded.check_layers(layers, hidden_size)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None

    def check_heads(self, kv_heads: int) -> None:
        try:
            self._loaded.check_heads(kv_heads)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        hidden = layer.hidden.to(keys.device)
        log_beta = self._loaded.on(hidden.device).log_beta(layer.index, hidden)
        if log_beta.shape[1] != layer.all_heads:  # no configuration said so before
            self._loaded.check_heads(layer.all_heads)
        return {"log_beta": layer.own_heads_of(log_beta)}

    def score(self, layer: LayerView) -> Tensor:
        return layer.column("log_beta") * (layer.tokens[:, None, None] - layer.positions)

    def allocate_all(self, layers: Sequence[LayerView]) -> list[Tensor]:
        shared = [x for x in layers if x.window is None]
        if self.allocation == "head" or not shared:
            return super().allocate_all(layers)
        device = shared[0].device
        keep = self._resolve(self.keep, shared[0]).clamp(min=1).long()
        scores = [x.all_heads_of(self._candidates(x), float("-inf")).to(device) for x in shared]
        heads = [x.shape[1] for x in scores]
        width = max(x.shape[2] for x in scores)
        pad = torch.nn.functional.pad
        everywhere = torch.cat([pad(x, (0, width - x.shape[2]), value=float("-inf")) for x in scores], 1)
        total = (keep * sum(heads)).to(device)
        sure = torch.tensor([int(self.floor * n) for n in keep.tolist()]).clamp(min=1).to(device)
        shares = share_out(everywhere, total, sure)
        # What a short prompt leaves of the budget goes to all alike: generated tokens may need it.
        spare = (total - shares.sum(1))[:, None].clamp(min=0)
        shares = shares + spare // sum(heads) + (torch.arange(sum(heads), device=device) < spare % sum(heads))
        own = iter(x.own_heads_of(part) for x, part in zip(shared, shares.split(heads, 1)))
        return [keep.int() if x.window is not None else next(own) for x in layers]

    def _candidates(self, layer: LayerView) -> Tensor:
        """Scores [rows, heads, capacity]; inf for what is protected, -inf where there is no entry."""
        positions = layer.positions
        end = (layer.tokens - self._resolve(self.recent, layer).to(layer.device))[:, None, None]
        scores = self.score(layer).masked_fill((positions < self.sinks) | (positions >= end), float("inf"))
        return scores.masked_fill(~layer.live, float("-inf"))
