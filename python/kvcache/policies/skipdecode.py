"""SkipDecode: fewer layers for later tokens."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Policy
from .budget import check_count
from .card import Card

PROMPT_MODES = ("full", "n_max", "schedule")


@dataclass(frozen=True)
class SkipDecode(Policy):
    """Run a number of layers that falls linearly with a token's position (arXiv 2307.02628, section 3).

    Position t runs ``n(t) = floor(max_layers - (max_layers - min_layers) * min(t / horizon, 1) + 0.5)`` layers: the
    first ``warmup`` and the topmost ``n(t) - warmup``. In a skipped layer the hidden state passes through unchanged
    and no key or value is stored. The active layers of a later position are a subset of those of an earlier one, so
    every entry that a layer needs is there. A row's depth follows its own real positions, never its padding.

    Arguments
        min_layers, max_layers: layers at and beyond ``horizon``, and at position 0 (defaults: the 2x table of
            OPT-6.7B, 32 layers).
        horizon: position at which the depth reaches ``min_layers``.
        warmup: bottom layers that always run.
        prompt: "full" runs all layers for the prompt, "n_max" runs ``max_layers``, "schedule" follows the schedule.

    The paper fine-tunes the model for the schedule; without that the quality drops.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2307.02628, section 3",
        rule=(
            "n(t) = `max_layers` - (`max_layers` - `min_layers`) min(t / `horizon`, 1) layers run: the first `warmup` "
            "and the topmost."
        ),
        holds="what the layers that run have stored",
        cost="negative: skipped layers cost nothing",
        use="Models fine-tuned for it. Others lose quality at once.",
    )

    min_layers: int = 11
    max_layers: int = 22
    horizon: int = 1024
    warmup: int = 1
    _: KW_ONLY
    prompt: str = "full"

    def __post_init__(self) -> None:
        check_count("min_layers", self.min_layers, 1)
        check_count("max_layers", self.max_layers, 1)
        check_count("horizon", self.horizon, 1)
        check_count("warmup", self.warmup)
        if self.min_layers > self.max_layers:
            raise ValueError(f"min_layers must not exceed max_layers, got {self.min_layers} > {self.max_layers}")
        if self.warmup > self.min_layers:
            raise ValueError(f"warmup must not exceed min_layers, got {self.warmup} > {self.min_layers}")
        if self.prompt not in PROMPT_MODES:
            raise ValueError(f"prompt must be one of {PROMPT_MODES}, got {self.prompt!r}")

    def check(self, num_layers: int) -> None:
        if self.max_layers > num_layers:
            raise ValueError(
                f"{self}: max_layers={self.max_layers} exceeds the {num_layers} decoder layers of this model"
            )

    def depth(self, positions: Tensor) -> Tensor:
        """Layers that each position runs, int64 like ``positions``."""
        # In integers: half rounds up, exactly, also where the quotient has no float.
        t = positions.clamp(0, self.horizon).long()
        return self.max_layers - (2 * (self.max_layers - self.min_layers) * t + self.horizon - 1) // (2 * self.horizon)

    def layers(self, num_layers: int, positions: Tensor, prompt: bool) -> Tensor | None:
        if prompt and self.prompt == "full":
            return None
        fixed = prompt and self.prompt == "n_max"
        depth = torch.full_like(positions, self.max_layers) if fixed else self.depth(positions)
        layer = torch.arange(num_layers)[:, None, None]
        return (layer < self.warmup) | (layer >= num_layers - (depth - self.warmup))
