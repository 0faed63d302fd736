"""GemFilter: read a prompt anew with the tokens that an early layer finds to matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Policy
from .budget import check_count
from .card import Card
from .promptdistill import PromptDistill, check_layers


@dataclass(frozen=True)
class GemFilter(Policy):
    """Read of a prompt only the tokens that its last query asks for in an early layer (arXiv 2409.17422, Algorithm 1).

    A first forward ends at layer r: the prompt's last token e gives every earlier token the mean over the query heads
    of q_h . k_j, averaged over ``pool`` neighbours, as :class:`PromptDistill` does. Then the model starts anew at layer
    0 with the ``keep`` best and e alone, at positions without gaps, which generated tokens continue. What is left out
    counts as padding: seen, but neither stored nor attended to.

    Arguments
        layer: r, from 0.
        keep: tokens of a prompt beside e that are read: an int, or a share of the prompt (rounded down, at least one).
        pool: neighbours, the token in the middle, whose scores are averaged; odd; 1: none.

    Defaults are those of the official code, where e competes for its place like the others and counts in ``keep``.
    Every forward of several tokens is a prompt: of a later turn its own tokens are filtered, by its own last query,
    which sees what was kept before. A prompt must come at once. Logits at tokens that were left out mean nothing.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2409.17422, Algorithm 1",
        rule=(
            "PromptDistill's scores at `layer`, in a forward that ends there; then the prompt is read anew with the "
            "`keep` best tokens and the last one alone, at positions without gaps."
        ),
        holds="`keep + 1` of the prompt, and what follows",
        cost="nothing; a prompt takes less",
        use="As PromptDistill, with less memory and small positions; what is left out is gone in all layers.",
    )

    layer: int = 13
    keep: int | float = 1024
    pool: int = 5

    def __post_init__(self) -> None:
        check_count("layer", self.layer)
        if isinstance(self.keep, tuple):
            raise TypeError(f"keep must be an int (tokens) or a float (share of the prompt), got {self.keep!r}")
        assert self.scout is not None  # which checks the rest

    @property
    def scout(self) -> Policy | None:  # type: ignore[override]
        return PromptDistill(self.layer, self.keep, self.pool)

    def check(self, num_layers: int) -> None:
        check_layers(self, (self.layer,), num_layers)
