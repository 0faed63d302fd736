"""Full: keep and read everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Policy
from .card import Card


@dataclass(frozen=True)
class Full(Policy):
    """The whole cache, paged: the outputs of the unwrapped model, without the copy that a growing tensor costs."""

    card: ClassVar[Card | None] = Card(
        source="—",
        rule="Everything stays and is read.",
        holds="every token",
        cost="nothing",
        use="The reference; a paged cache whose beams, samples and forks share pages.",
    )
