"""Merging: what leaves goes into what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...layer_state import LayerView


@dataclass(frozen=True)
class Merged:
    """What entries that stay become when others leave: ``slots`` [rows, heads, m] int64, distinct, -1 for none; their
    new ``keys`` [rows, heads, m, Dk], without rotation, and ``values`` [rows, heads, m, Dv]; None leaves them alone."""

    slots: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


class Merging:
    """Folds entries that leave into entries that stay; belongs to a policy that evicts.

    Class attributes
        merges_keys: whether :meth:`merge` changes keys, which takes a model whose rotation is known.
    """

    merges_keys: bool = False

    @property
    def merges(self) -> bool:
        """Whether the policy folds what leaves into what stays."""
        return type(self).merge is not Merging.merge

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged | None:
        """What ``kept`` entries become when the ``evicted`` ones leave, both [rows, heads, capacity] bool.

        Called whenever entries leave a layer without a sliding window (where they leave because no query will see them
        any more), with all of them still there; a head may lose none. The engine writes the result. None changes
        nothing. A crop does not undo what was merged.
        """
        return None
