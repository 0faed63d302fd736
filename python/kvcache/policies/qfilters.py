"""QFilters: keep the keys that point where the model's queries come from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget
from .card import Card
from .files import read_numbers
from .keeping import _Keeping

if TYPE_CHECKING:
    from ..layer_state import LayerView

Filters = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class QFilters(_Keeping):
    """Keep the entries whose keys have the smallest product with their head's filter (arXiv 2503.02812, section 3).

    Queries of a head lie mostly along one direction, the first right singular vector of many of them, and so the
    product of a key with that direction says how much attention the key gets on the average, whatever the query. The
    filter of a head is that direction turned round, so that the score of an entry is -<filter, k>: the form of the
    files that the paper's authors publish and kvpress reads.

    Arguments
        filters: the path of a file, a tensor or nested sequences, of numbers [layers][kv heads][channels of a key]
            (``.safetensors``: one tensor; ``.json``: nested lists). :func:`kvcache.calibrate_qfilters` makes one for a
            model. A model is refused at ``wrap`` without them, or if they are those of another.
        keep: entries per kv head: an int, a share of the prompt, or bytes.
        sinks, recent: protected entries, part of ``keep`` (source: none).

    The product is taken with keys as the model rotated them, once, when a token is stored: a decode step computes
    nothing else for it. A path stays a path in the text form, anything else is written out.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2503.02812, section 3",
        rule=(
            "-⟨filter, k⟩, the filter of a kv head being minus the main direction of its queries: the `keep` largest "
            "stay."
        ),
        holds="`keep`",
        cost="one dot product per new token, choosing one victim per head",
        use="Without attention, where the question is not known yet; needs filters calibrated for the model.",
    )

    filters: Filters | str | None = None
    keep: Budget = 0.2
    sinks: int = 0
    recent: Budget = 0

    columns: ClassVar[tuple[str, ...]] = ("filtered",)

    def __post_init__(self) -> None:
        super().__post_init__()
        filters: Any = self.filters
        known: Tensor | None = None
        if isinstance(filters, (str, os.PathLike)):
            filters = os.fspath(filters)
            known = _checked(read_numbers(Path(filters), "filters"), f"filters in {filters}")
        elif filters is not None:
            known = _checked(filters, "filters")
            filters = tuple(tuple(map(tuple, layer)) for layer in known.tolist())
        object.__setattr__(self, "filters", filters)
        object.__setattr__(self, "_known", {} if known is None else {known.device: known})  # device -> [L, H, D]

    def check(self, num_layers: int) -> None:
        known = self._on(torch.device("cpu"))
        if known is None:
            raise ValueError(
                "qfilters: filters must be given, the path of a file: kvcache.calibrate_qfilters makes one"
            )
        if len(known) != num_layers:
            raise ValueError(f"qfilters: filters has {len(known)} layers, the model {num_layers}")

    def check_heads(self, kv_heads: int) -> None:
        known = self._on(torch.device("cpu"))
        if known is not None and known.shape[1] != kv_heads:
            raise ValueError(f"qfilters: filters has {known.shape[1]} kv heads, a layer of the model {kv_heads}")

    def _on(self, device: torch.device) -> Tensor | None:
        """The filters where a layer needs them, carried over once."""
        known: dict[torch.device, Tensor] = self._known  # type: ignore[attr-defined]
        if known and device not in known:
            known[device] = next(iter(known.values())).to(device)
        return known.get(device)

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        known = self._on(keys.device)
        assert known is not None  # else refused
        own = layer.own_heads_of(known[layer.index][None])[0]
        if own.shape != (keys.shape[1], keys.shape[3]):  # no configuration said so before
            raise ValueError(
                f"qfilters: filters has {own.shape[0]} kv heads of {own.shape[1]} channels, layer {layer.index} of the "
                f"model {keys.shape[1]} of {keys.shape[3]}"
            )
        return {"filtered": (keys.float() * own[None, :, None]).sum(-1)}

    def score(self, layer: LayerView) -> Tensor:
        return -layer.column("filtered")


def _checked(filters: Any, name: str) -> Tensor:
    """``filters`` as a tensor [layers, kv heads, D] float32 on the CPU; TypeError or ValueError naming ``name``."""
    wanted = f"{name} must be numbers [layers][kv heads][channels of a key], or the path of a file with them"
    try:
        known = torch.as_tensor(filters, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}; got {type(filters).__name__} that is no such table") from None
    if known.ndim != 3 or not known.numel():
        raise ValueError(f"{wanted}; got the shape {list(known.shape)}")
    if not math.isfinite(float(known.abs().max())):
        raise ValueError(f"{wanted}; some of them are not finite")
    return known
