"""The Selection Cache (TokenSelect, arXiv 2411.02886, Algorithm 1): the list of entries that each row goes on reading.

State of a layer, as :func:`kvcache.ops.select_tokens` describes it: ``query`` [rows, query_heads, D] that made the
list, ``index`` [rows, 1, width] int32 slots, ``counts`` [rows, 1] of them, ``until`` [rows] the first slot that is not
on the list yet, ``at`` [rows] entries held when it was made (0: never). The op changes these in place in decode steps;
the functions here do it for chunks of a prompt, and where ranks must talk to each other in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .axes import Selection


def opened(query: Tensor, width: int) -> dict[str, Any]:
    """The state before any selection, for queries like ``query`` and lists of ``width`` slots."""
    rows, device = len(query), query.device
    index = torch.full((rows, 1, width), -1, dtype=torch.int32, device=device)
    until, at, counts = torch.zeros(3, rows, dtype=torch.int32, device=device).unbind()
    return {"query": torch.zeros_like(query), "index": index, "counts": counts[:, None], "until": until, "at": at}


def extend(state: dict[str, Any], end: Tensor, spare: int) -> Selection:
    """The list of each row and every entry that came since, up to slot ``end`` [rows]; ``spare``: room beyond that."""
    index, counts, until = state["index"], state["counts"], state["until"]
    fresh = int((end - until).max())
    need = int(counts.max()) + max(fresh, 0)
    if need > index.shape[2]:
        index = widen(index, need + spare)
    if fresh > 0:
        step = torch.arange(fresh, dtype=torch.int32, device=end.device)[None]
        new = step < (end - until)[:, None]
        place = torch.where(new, counts + step, index.shape[2] - 1).long()
        slots = torch.where(new, until[:, None] + step, index[:, 0].gather(1, place))
        index[:, 0].scatter_(1, place, slots)
        counts = counts + (end - until).clamp(min=0)[:, None]
    state.update(index=index, counts=counts, until=torch.maximum(end, until))
    return Selection(index, counts)


def renew(state: dict[str, Any], stale: Tensor, query: Tensor, fresh: Selection, held: Tensor) -> Selection:
    """The ``stale`` rows [rows] bool take the ``fresh`` list that ``query`` made of ``held`` entries [rows]."""
    index = torch.where(stale[:, None, None], fresh.index, state["index"])
    counts = torch.where(stale[:, None], fresh.counts, state["counts"])
    state.update(
        query=torch.where(stale[:, None, None], query, state["query"]).contiguous(),
        index=index,
        counts=counts,
        until=torch.where(stale, held, state["until"]),
        at=torch.where(stale, held, state["at"]),
    )
    return Selection(index, counts)


def widen(index: Tensor, width: int) -> Tensor:
    """``index`` [rows, 1, n] with room for ``width`` slots."""
    return torch.nn.functional.pad(index, (0, width - index.shape[2]), value=-1)
