"""Layer schedule: which tokens run which layers, by their positions."""

from __future__ import annotations

from torch import Tensor


class Schedule:
    """Skips layers."""

    @property
    def schedules(self) -> bool:
        """Whether the policy skips layers."""
        return type(self).layers is not Schedule.layers

    def layers(self, num_layers: int, positions: Tensor, prompt: bool) -> Tensor | None:
        """Which tokens run which layer: bool [num_layers, rows, T] for ``positions`` [rows, T] int32; None: all.

        ``prompt``: the tokens belong to a prompt. A layer that a position runs must be run by all earlier ones.
        """
        return None
