"""Positions: by what keys and queries are rotated."""

from __future__ import annotations


class Positions:
    """Where entries stand.

    Class attributes
        relocates: whether what is kept, by whatever policy, is rotated by its place in the cache; takes a model whose
            rotation is known.
    """

    relocates: bool = False

    @property
    def positions(self) -> str:
        """How keys are rotated: by "original" positions; by their place in the list that is read ("compact"), or among
        all entries of their head ("cache")."""
        return "cache" if self.relocates else "original"

    @property
    def query_place(self) -> int:
        """Position by which queries are rotated when they vote under compact positions."""
        return 0
