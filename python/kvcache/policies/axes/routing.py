"""Token routing: which tokens of a prompt go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ...layer_state import LayerView
    from ..base import Policy


class Routing:
    """Drops tokens of a prompt from later layers, or from all.

    Class attributes
        routes_after: layers after which :meth:`route` is asked, ascending.
        scout: a policy whose :meth:`route`, first asked in a forward of its own that ends there, says which tokens of a
            prompt are read at all: the others count as padding, so that positions have no gaps.
    """

    routes_after: tuple[int, ...] = ()
    scout: Policy | None = None

    @property
    def routes(self) -> bool:
        """Whether the policy drops tokens of a prompt from later layers, or from all."""
        return bool(self.routes_after) or self.scout is not None

    def route(self, layer: LayerView, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor | None:
        """Which tokens of a prompt run the layers after this one: bool [rows, T]; None: all of them.

        Asked when one of the layers ``routes_after`` has attended, for the tokens that run it: ``queries`` [rows,
        query_heads, T, D] and ``keys`` [rows, heads, T, D] as the model rotated them, ``positions`` [rows, T] int32
        (-1: padding). What is dropped keeps its hidden state from here on and leaves no entry in later layers; the
        token whose output generation continues from is never dropped. ``layer.prompt_span`` says where the prompt ends.
        """
        raise NotImplementedError
