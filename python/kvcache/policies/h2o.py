"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .base import Policy
from .budget import Budget, check_budget
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class H2O(Policy):
    """Keep the entries that received most attention so far and the newest ones (arXiv 2306.14048, Algorithm 1).

    The score of an entry is the attention probability that it received from every query since it was stored, summed.
    Each kv head keeps its own ``heavy`` best and the last ``recent``. A step attends heavy + recent + 1 entries and
    evicts afterwards. With grouped queries a kv head's probability is the mean over its query heads (``group="max"``:
    the largest), which the paper leaves open.

    Arguments
        heavy: heavy hitters per kv head: an int, a share of the prompt (paper: 0.1), or bytes.
        recent: newest entries per kv head, likewise (paper: 0.1).
        group: "mean" or "max", the reduction over the query heads of a group.

    Budgets are fixed when a prompt ends. Unlike the official simulation an evicted entry never returns, and future
    queries never count (reference/papers.md, section 1).
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2306.14048, Algorithm 1",
        rule=(
            "s_j = Σ_t softmax(q_t K / √D)_j over all queries so far, mean (or max) over a kv head's group; the "
            "`heavy` largest stay, and the last `recent`."
        ),
        holds="`heavy + recent`",
        cost="adding the step's probabilities to the scores, choosing one victim per head",
        use=(
            "Text that goes on about what it attended to. Old entries have had more queries to score with: retrieval "
            "suffers."
        ),
    )

    heavy: Budget = 0.1
    recent: Budget = 0.1
    _: KW_ONLY
    group: str = "mean"

    needs: ClassVar[frozenset[str]] = frozenset({"attention_sums"})

    def __post_init__(self) -> None:
        check_budget("heavy", self.heavy, zero=True)
        check_budget("recent", self.recent, zero=True)
        if self.heavy == 0 and self.recent == 0:
            raise ValueError("heavy and recent are both 0: nothing would be kept")
        if self.group not in ("mean", "max"):
            raise ValueError(f"group must be 'mean' or 'max', got {self.group!r}")

    @property
    def group_reduction(self) -> str:  # type: ignore[override]
        return self.group

    @property
    def retains(self) -> bool:
        return True

    def allocate(self, layer: LayerView) -> Tensor:
        return (self._resolve(self.heavy, layer) + self.allocate_recent(layer)).clamp(min=1)

    def score(self, layer: LayerView) -> Tensor:
        return layer.scores
