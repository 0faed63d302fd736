"""EMASink: attention sinks that absorb what leaves the window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .axes import Merged
from .budget import check_count
from .card import Card
from .merging import listed
from .streamingllm import StreamingLLM

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class EMASink(StreamingLLM):
    """StreamingLLM whose sinks are exponential moving averages of what leaves the window.

    Source: EMA-Sink of Reward Forcing (arXiv 2512.04678), made for video diffusion; what it is for tokens is our
    adaptation (reference/papers.md, section 6) and no published result. The e-th token behind the sinks goes, when it
    leaves, into sink ``pinned`` + e mod (``sinks`` - ``pinned``), with its key and its value, in the order of tokens:

        S <- alpha S + (1 - alpha) x.

    Keys are averaged without the rotation of their positions, in float32 that is kept from one eviction to the next,
    and stand at the sink's own position; with ``| cachepositions`` all keys are rotated by their place in the cache, as
    in the source.

    Arguments
        sinks, window: as in StreamingLLM.
        alpha: what remains of a sink when a token goes into it, in [0, 1]; 1 is StreamingLLM.
        pinned: so many first sinks never change: after n tokens the content of a sink that does weighs alpha^n.
        counted: the average of all that went into a sink, each of equal weight, the sink's own token among them (c
            tokens so far: alpha is c / (c + 1)); ``alpha`` is not used then.

    In a layer with a sliding window nothing is merged.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2512.04678, adapted by us",
        rule=(
            "As `streamingllm`; the e-th token behind the sinks goes, when it leaves, into sink `pinned` + e mod "
            "(`sinks` - `pinned`): S = `alpha` S + (1 - `alpha`) x, keys without their rotation."
        ),
        holds="`sinks + window`, and `sinks` keys and values in float32",
        cost="merging one entry per head; no graph",
        use="Experimental: no result for language models is published.",
    )

    alpha: float = 0.99
    _: KW_ONLY
    pinned: int = 0
    counted: bool = False

    columns: ClassVar[tuple[str, ...]] = ("merged",)  # tokens that went into an entry
    merges_keys = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("pinned", self.pinned)
        if self.pinned >= self.sinks:
            raise ValueError(f"pinned must be less than sinks, or nothing merges; got {self.pinned} of {self.sinks}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"alpha must be a number, got {self.alpha!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not isinstance(self.counted, bool):
            raise TypeError(f"counted must be True or False, got {self.counted!r}")

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        return {"merged": torch.zeros(keys.shape[:3], device=keys.device)}

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state  # what a sink has taken up stays in it; one that is gone is told by its column

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged | None:
        if self.alpha == 1 and not self.counted:
            return None
        positions, column = layer.positions, layer.column("merged")
        slots = torch.arange(self.sinks - self.pinned, device=positions.device)
        is_sink = kept[:, :, None] & (positions[:, :, None] == self.pinned + slots[:, None])  # [R, H, slots, C]
        sink = is_sink.int().argmax(-1)
        leave = listed(evicted, positions)
        into = (positions.gather(2, leave.clamp(min=0)) - self.sinks) % len(slots)
        goes = ((into[..., None] == slots) & (leave >= 0)[..., None]).float()  # [R, H, E, slots]
        later = goes.flip(2).cumsum(2).flip(2) - goes
        total = goes.sum(2)
        merged = column.gather(2, sink)
        if self.counted:
            own = (1 + merged) / (1 + merged + total)
            shares = goes / (1 + merged + total)[:, :, None]
        else:
            own = self.alpha**total
            shares = goes * (1 - self.alpha) * self.alpha**later
        state, out = layer.state, {}
        for name, at in (("keys", layer.plain_keys_at), ("values", layer.values_at)):
            now = at(sink)
            if name in state:  # what is stored is rounded
                now = torch.where((merged > 0)[..., None], state[name], now)
            out[name] = own[..., None] * now + shares.transpose(2, 3) @ at(leave)
        state.update(out)
        changes = is_sink.any(-1) & (total > 0)
        column.scatter_add_(2, sink, torch.where(changes, total, 0.0))
        return Merged(torch.where(changes, sink, -1), **out)
