"""StreamingLLM: attention sinks and a window of recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .base import Policy
from .budget import Budget, check_budget, check_count
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first ``sinks`` tokens and the last ``window`` ones (arXiv 2309.17453; mit-han-lab/streaming-llm).

    Arguments
        sinks: tokens kept from the start of each row; 0 gives the plain window of the paper's comparison.
        window: newest tokens kept: an int, a share of the prompt, or bytes.

    Keys keep the rotation of their original position; the paper re-rotates them to their place in the cache.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2309.17453",
        rule="The first `sinks` and the last `window` tokens stay.",
        holds="`sinks + window`",
        cost="nothing",
        use="Endless streams where only the recent text matters. What lies between is gone: no retrieval.",
    )

    sinks: int = 4
    window: Budget = 1020

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks)
        check_budget("window", self.window)

    @property
    def retains(self) -> bool:
        return True

    def allocate(self, layer: LayerView) -> Tensor:
        return self.sinks + self.allocate_recent(layer)

    def allocate_recent(self, layer: LayerView) -> Tensor:
        return self._resolve(self.window, layer).clamp(min=1)
