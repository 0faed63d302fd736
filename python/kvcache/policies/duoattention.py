"""DuoAttention: some heads keep everything, the others sinks and a window."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .base import Policy
from .budget import FAR, Budget, check_budget, check_count
from .card import Card
from .files import read_numbers

if TYPE_CHECKING:
    from ..layer_state import LayerView

Heads = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class DuoAttention(Policy):
    """Retrieval heads keep every entry, streaming heads the first ``sinks`` and the last ``recent`` (arXiv 2410.10819).

    Which kv head is which comes from a calibration of the model (the paper trains a gate per head and takes the largest
    as retrieval heads). The pages of streaming heads are really freed.

    Arguments
        heads: which kv heads are retrieval heads: booleans [layers][kv heads] as nested sequences or a tensor, or the
            path of a file with them (``.json``: nested lists; ``.safetensors``: one tensor [layers, kv heads], bool or
            integers 0 and 1). Or a share in (0, 1]: so many of all heads of the model, drawn with ``seed``. That
            measures bytes and time; what the model still knows then is a matter of luck.
        sinks, recent: entries of a streaming head (paper: 128 and 256); ``recent`` may be a share of the prompt or
            bytes, too.
        seed: another seed draws other heads for a share.

    A path stays a path in the text form, everything else is written out. Keys keep the rotation of their original
    position. In a layer with a sliding window retrieval heads keep what the window shows.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2410.10819",
        rule="Retrieval heads keep everything; the others the first `sinks` and the last `recent`.",
        holds="all of the retrieval heads' entries, `sinks + recent` of the others'",
        cost="nothing",
        use="Half the memory with retrieval intact, given calibrated heads.",
    )

    heads: Heads | float | str = 0.5
    sinks: int = 128
    recent: Budget = 256
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        heads: Any = self.heads
        if isinstance(heads, (str, os.PathLike)):
            heads = os.fspath(heads)
            known = _checked(read_numbers(Path(heads), "heads"), f"heads in {heads}")
        elif isinstance(heads, float):
            if not 0.0 < heads <= 1.0:
                raise ValueError(f"heads as a share of all heads must be in (0, 1], got {heads}")
            known = None
        else:
            heads = known = _checked(heads, "heads")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "_known", known)
        check_count("sinks", self.sinks)
        check_budget("recent", self.recent)
        check_count("seed", self.seed)

    @property
    def retains(self) -> bool:
        return True

    def check(self, num_layers: int) -> None:
        known: Heads | None = self._known  # type: ignore[attr-defined]
        if known is not None and len(known) != num_layers:
            raise ValueError(f"duoattention: heads has {len(known)} layers, the model {num_layers}")

    def check_heads(self, kv_heads: int) -> None:
        for i, layer in enumerate(self._known or ()):  # type: ignore[attr-defined]
            if len(layer) != kv_heads:
                raise ValueError(f"duoattention: heads[{i}] has {len(layer)} kv heads, a layer of the model {kv_heads}")

    def retrieval(self, layer: LayerView) -> Tensor:
        """Which of the kv heads of ``layer`` that are here are retrieval heads, bool [heads]."""
        known: Heads | None = self._known  # type: ignore[attr-defined]
        if known is None:
            total = layer.num_layers * layer.all_heads
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
            row = (order < round(self.heads * total)).view(layer.num_layers, -1)[layer.index]
        else:
            row = torch.tensor(known[layer.index])
            if len(row) != layer.all_heads:  # no configuration said so before
                raise ValueError(
                    f"duoattention: heads[{layer.index}] has {len(row)} kv heads, layer {layer.index} of the model "
                    f"{layer.all_heads}"
                )
        return layer.own_heads_of(row[None])[0]

    def allocate(self, layer: LayerView) -> Tensor:
        streaming = self.sinks + self.allocate_recent(layer)
        return torch.where(self.retrieval(layer), FAR, streaming[:, None])

    def allocate_recent(self, layer: LayerView) -> Tensor:
        return self._resolve(self.recent, layer).clamp(min=1)


def _checked(heads: Any, name: str) -> Heads:
    """``heads`` as nested tuples of bool; TypeError or ValueError naming ``name`` for anything else."""
    if hasattr(heads, "tolist"):
        heads = heads.tolist()
    wanted = f"{name} must be booleans [layers][kv heads], the path of a file with them, or a share of heads (float)"
    if not isinstance(heads, Sequence) or isinstance(heads, (str, bytes)) or not heads:
        raise TypeError(f"{wanted}; got {heads!r}")
    layers = []
    for i, layer in enumerate(heads):
        if not isinstance(layer, Sequence) or isinstance(layer, (str, bytes)) or not layer:
            raise TypeError(f"{wanted}; layer {i} is {layer!r}")
        if any(x not in (0, 1) for x in layer):
            raise ValueError(f"{wanted}; layer {i} is {layer!r}")
        layers.append(tuple(bool(x) for x in layer))
    return tuple(layers)
