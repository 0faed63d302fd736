"""Full: keep and read everything."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """The whole cache, paged: the outputs of the unwrapped model, without the copy that a growing tensor costs."""
