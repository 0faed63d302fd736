"""Selection: which entries a step reads; nothing is evicted."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...layer_state import LayerView


@dataclass(frozen=True)
class Selection:
    """Entries that one step of one layer reads: ``index`` [rows, lists, K] int32 slots, ascending, ``counts``
    [rows, lists] int32 of them; one list for all kv heads of the layer, or one for each. ``pages``: the lists name
    pages instead, page p being the slots from p * page_size on."""

    index: Tensor
    counts: Tensor
    pages: bool = False

    def slots(self, page_size: int, entries: Tensor) -> Selection:
        """The same by slots, of heads that hold ``entries`` [rows, heads] int32."""
        if not self.pages:
            return self
        lists = self.index.shape[1]
        offsets = torch.arange(page_size, dtype=torch.int32, device=self.index.device)
        slots = (self.index[..., None] * page_size + offsets).flatten(2)
        # Only the last page of a head may be filled in part, and it ends the list.
        counts = ((slots >= 0) & (slots < entries[:, :lists, None])).sum(2, dtype=torch.int32)
        return Selection(slots, counts)


class Selecting:
    """Chooses what each step reads."""

    @property
    def selects(self) -> bool:
        """Whether the policy chooses what each step reads."""
        return type(self).select is not Selecting.select

    def select(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection | None:
        """Entries to read for ``queries`` [rows, query_heads, T, D] at ``positions`` [rows, T] int32 (-1: padding).

        The queries' own tokens are already stored; entries at later positions are hidden anyway. None reads all.
        """
        raise NotImplementedError

    @property
    def prefill_chunk(self) -> int | None:
        """Queries per selection when many arrive at once; None: all together."""
        return None

    @property
    def selects_in_prompts(self) -> bool:
        """Whether the queries of prompts select as well; False: they read everything."""
        return True

    def phase(self, layer: LayerView) -> Hashable:
        """What :meth:`select` goes by on the host in a step of one query per row, without asking a device.

        While the phase of every layer stays the same, a captured step may be replayed: the kernels of ``select`` read
        all else from memory that stays where it is. None: no step may be captured.
        """
        return None

    @property
    def page_bounds(self) -> bool:
        """Whether the selection needs the smallest and largest key of every page, kept beside the pages."""
        return False
