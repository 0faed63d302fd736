"""The policy interface: what a policy may decide, and what it is shown when it decides.

A policy is an immutable description (a frozen dataclass); whatever it must remember between steps lives in the cache,
in the layer's side columns or in ``layer.state``. It never touches pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from .axes import NEEDS, Merging, Positions, Retention, Routing, Schedule, Selecting
from .card import Card

REGISTRY: dict[str, type[Policy]] = {}


class Policy(Retention, Merging, Selecting, Positions, Schedule, Routing):
    """Base of all policies. Subclass as a frozen dataclass and override what the policy decides, on one axis or more.

    What a subclass may override, by axis (kvcache/policies/axes)
        :class:`.Retention`: ``score``, ``allocate``, and what they need; :class:`.Merging`: ``merge``;
        :class:`.Selecting`: ``select``; :class:`.Positions`: ``positions``; :class:`.Schedule`: ``layers``;
        :class:`.Routing`: ``route``.

    Class attributes
        card: what the catalogue says of it; only kvcache's own policies need one.
    """

    card: ClassVar[Card | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unknown = set(cls.needs) - NEEDS
        if unknown:
            raise TypeError(f"{cls.__name__}.needs names {sorted(unknown)}; known: {sorted(NEEDS)}")
        if len(cls.needs) > 1:
            raise TypeError(
                f"{cls.__name__}.needs names {sorted(cls.needs)}; there is one score column, for one of them"
            )
        if not cls.__name__.startswith("_"):
            REGISTRY[cls.__name__.lower()] = cls

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the policy cannot work on a model with ``num_layers`` decoder layers."""

    def check_heads(self, kv_heads: int) -> None:
        """Raise ValueError if the policy cannot work on layers that cache ``kv_heads`` key-value heads each.

        Called at ``wrap``, where the model's configuration says how many there are.
        """

    def check_hidden(self, layers: Sequence[int], hidden_size: int | None) -> None:
        """Raise ValueError if a policy that ``needs_hidden`` cannot work on hidden states of ``hidden_size`` channels
        (None: the configuration does not say) in ``layers``, those that cache keys and values. Called at ``wrap``.
        """

    # -- text form and composition ----------------------------------------------------------------------------------

    def __or__(self, other: Policy) -> Policy:
        from .compose import compose

        return compose(self, other)

    def __str__(self) -> str:
        shown = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not f.kw_only or value != f.default:
                shown.append(f"{f.name}={value!r}")
        name = type(self).__name__.lower()
        return f"{name}({', '.join(shown)})" if shown else name
