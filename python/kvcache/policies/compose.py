"""Composition of policies with ``|``: one part for each axis (retention, selection, layer schedule)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .axes import Merged, Selection
from .base import Policy

if TYPE_CHECKING:
    from ..layer_state import LayerView

AXES = {
    "retains": "retention (what stays)",
    "selects": "selection (what is read)",
    "schedules": "layer schedule",
    "routes": "token routing (which tokens of a prompt run)",
    "relocates": "positions of what is kept",
}


class _Composite(Policy):
    """Several policies as one; made by ``|``, never by hand."""

    def __init__(self, parts: tuple[Policy, ...]) -> None:
        self.parts = parts
        self._by_axis: dict[str, Policy] = {}
        for part in parts:
            for axis, meaning in AXES.items():
                if not getattr(part, axis):
                    continue
                if axis in self._by_axis:
                    raise ValueError(f"cannot combine {self._by_axis[axis]} | {part}: both decide the {meaning}")
                self._by_axis[axis] = part
        retention, selection = self._by_axis.get("retains"), self._by_axis.get("selects")
        if retention is not None and selection is not None:
            raise ValueError(
                f"cannot combine {retention} | {selection}: {type(selection).__name__} reads from everything that was "
                f"seen, but {type(retention).__name__} evicts"
            )
        schedule, routing = self._by_axis.get("schedules"), self._by_axis.get("routes")
        if schedule is not None and routing is not None:
            raise ValueError(
                f"cannot combine {schedule} | {routing}: both decide which layers a token runs, and "
                f"{type(routing).__name__} may ask tokens in layers that {type(schedule).__name__} lets them skip"
            )
        if selection is not None and routing is not None:
            raise ValueError(
                f"cannot combine {selection} | {routing}: {type(selection).__name__} reads from everything that was "
                f"seen, but {type(routing).__name__} leaves tokens of a prompt out"
            )
        if routing is not None:
            self.routes_after, self.scout = routing.routes_after, routing.scout
        self.relocates = "relocates" in self._by_axis
        if selection is not None and self.relocates:
            raise ValueError(
                f"cannot combine {selection} | {self._by_axis['relocates']}: {type(selection).__name__} says itself by "
                "which positions it reads"
            )
        if retention is not None:
            for name in (
                *("needs", "columns", "group_reduction", "budget", "sinks", "recent", "slack", "observed", "generated"),
                *("needs_hidden", "reallocates", "merges_keys", "observes_generated", "needs_rotation"),
                "needs_output_projection",
            ):
                setattr(self, name, getattr(retention, name))

    @property
    def retains(self) -> bool:
        return "retains" in self._by_axis

    @property
    def selects(self) -> bool:
        return "selects" in self._by_axis

    @property
    def schedules(self) -> bool:
        return "schedules" in self._by_axis

    def allocate(self, layer: LayerView) -> Tensor:
        return self._by_axis["retains"].allocate(layer)

    def allocate_all(self, layers: Sequence[LayerView]) -> list[Tensor]:
        return self._by_axis["retains"].allocate_all(layers)

    def allocate_recent(self, layer: LayerView) -> Tensor:
        return self._by_axis["retains"].allocate_recent(layer)

    def score(self, layer: LayerView) -> Tensor | None:
        return self._by_axis["retains"].score(layer)

    @property
    def merges(self) -> bool:
        return self.retains and self._by_axis["retains"].merges

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged | None:
        return self._by_axis["retains"].merge(layer, evicted, kept)

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        return self._by_axis["retains"].append_columns(layer, keys, values)

    @property
    def observes(self) -> bool:
        return self.retains and self._by_axis["retains"].observes

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        self._by_axis["retains"].observe(layer, queries, positions)

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._by_axis["retains"].crop_state(state) if self.retains else {}

    def select(self, layer: LayerView, queries: Tensor, positions: Tensor) -> Selection | None:
        return self._by_axis["selects"].select(layer, queries, positions)

    @property
    def prefill_chunk(self) -> int | None:
        return self._by_axis["selects"].prefill_chunk if self.selects else None

    @property
    def selects_in_prompts(self) -> bool:
        return self._by_axis["selects"].selects_in_prompts

    @property
    def positions(self) -> str:
        return self._by_axis["selects"].positions if self.selects else super().positions

    @property
    def query_place(self) -> int:
        return self._by_axis["selects"].query_place if self.selects else 0

    def phase(self, layer: LayerView) -> Hashable:
        return self._by_axis["selects"].phase(layer)

    @property
    def page_bounds(self) -> bool:
        return self.selects and self._by_axis["selects"].page_bounds

    def layers(self, num_layers: int, positions: Tensor, prompt: bool) -> Tensor | None:
        return self._by_axis["schedules"].layers(num_layers, positions, prompt)

    def route(self, layer: LayerView, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor | None:
        return self._by_axis["routes"].route(layer, queries, keys, positions)

    def check(self, num_layers: int) -> None:
        for part in self.parts:
            part.check(num_layers)

    def check_heads(self, kv_heads: int) -> None:
        for part in self.parts:
            part.check_heads(kv_heads)

    def check_hidden(self, layers: Sequence[int], hidden_size: int | None) -> None:
        for part in self.parts:
            part.check_hidden(layers, hidden_size)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Composite) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def compose(*policies: Any) -> Policy:
    """``policies`` as one policy; ValueError when two decide the same thing, TypeError when one is no policy."""
    parts: list[Policy] = []
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(f"only policies can be combined with |, got {policy!r}")
        parts += policy.parts if isinstance(policy, _Composite) else [policy]
    # A part that decides nothing (Full) is the identity of |.
    deciding = [p for p in parts if any(getattr(p, axis) for axis in AXES)]
    if len(deciding) <= 1:
        return (deciding or parts)[0]
    return _Composite(tuple(deciding))
