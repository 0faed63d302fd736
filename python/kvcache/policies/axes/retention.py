"""Retention and allocation: which entries stay, and how many each head may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget, resolve_budget

if TYPE_CHECKING:
    from ...layer_state import LayerView

NEEDS = frozenset({"attention_sums", "last_attention", "window_attention"})


class Retention:
    """Evicts: ``score`` says what leaves first, ``allocate`` how many stay.

    Class attributes
        budget, sinks, recent: see :meth:`allocate`; ``budget`` None keeps everything.
        generated: "evict": the budget holds at all times; "keep": only a prompt is brought within it, and what follows
            stays, whole, until the next prompt ends (as in papers that compress prompts).
        slack: entries by which a head may exceed its budget while decoding. The first one beyond brings it back to the
            budget, so that ``score`` is asked once in ``slack`` + 1 tokens; for scores that take the whole layer to
            compute. The end of a prompt always leaves the budget. 0: every step evicts.
        reallocates: whether budgets are shared out anew (:meth:`allocate_all`) whenever entries have to leave, not
            only at the end of a prompt. What a row may keep in all layers together must not change by that.
        needs: the statistic that the engine keeps in the score column of every entry, at most one of
            ``"attention_sums"`` (probability summed over all queries so far), ``"last_attention"`` (probability
            given by the newest query) and ``"window_attention"`` (probability summed over the last ``observed`` queries
            of the last prompt; later tokens change nothing and have 0). All are reduced over the query heads of a kv
            head with ``group_reduction``.
        columns: names of further side columns, filled by :meth:`append_columns`.
        needs_hidden: whether :meth:`append_columns` reads ``layer.hidden``, the hidden states that entered the layer's
            attention module. Models whose attention does not go through transformers' interface are refused then.
        needs_rotation: whether the policy takes the rotation off queries or keys; models without one that is known are
            refused.
        needs_output_projection: whether the policy reads ``layer.output_projection``; models where that is not known
            are refused.
        observes_generated: whether :meth:`observe` is shown the queries of generated tokens as well; such steps are not
            captured as graphs.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[tuple[str, ...]] = ()
    needs_hidden: ClassVar[bool] = False
    needs_rotation: ClassVar[bool] = False
    needs_output_projection: ClassVar[bool] = False
    observes_generated: ClassVar[bool] = False
    reallocates: bool = False
    observed: int = 0
    generated: str = "evict"
    group_reduction: str = "mean"
    budget: Budget | None = None
    sinks: int = 0
    recent: Budget = 0
    slack: int = 0

    @property
    def retains(self) -> bool:
        """Whether the policy evicts."""
        return self.budget is not None

    def allocate(self, layer: LayerView) -> Tensor:
        """Entries that each head keeps between steps, [rows] or [rows, heads] int. Called at the end of each prompt.

        The default grants every head of every layer ``budget``, of which the first ``sinks`` entries and the last
        ``recent`` ones are protected. Never below 1.
        """
        assert self.budget is not None
        return self._resolve(self.budget, layer).clamp(min=1)

    def allocate_all(self, layers: Sequence[LayerView]) -> list[Tensor]:
        """What :meth:`allocate` gives each of ``layers``; override it where layers share one budget.

        ``layers``: all that hold entries, at the end of a prompt; a single one that gets its first entries later.
        """
        return [self.allocate(layer) for layer in layers]

    def allocate_recent(self, layer: LayerView) -> Tensor:
        """How many of the newest entries are protected, [rows] int; the default resolves ``recent``."""
        return self._resolve(self.recent, layer)

    def score(self, layer: LayerView) -> Tensor | None:
        """Retention score of every entry, [rows, heads, capacity] float32: the lowest leaves first.

        None means "the oldest leaves first". Values of dead slots are ignored.
        """
        return None

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        """Values of the declared ``columns`` for new tokens with keys, values [rows, heads, T, D]: name -> [.., T]."""
        return {}

    @property
    def observes(self) -> bool:
        """Whether the policy wants to see queries: those of prompts, of all tokens with ``observes_generated``."""
        return type(self).observe is not Retention.observe

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        """See a prompt's ``queries`` [rows, query_heads, T, D], as the model rotated them, after they have attended.

        ``positions`` [rows, T] int32, -1: padding, or a token that is not accepted or skips the layer. Called for every
        part of a prompt. What is to be remembered goes into ``layer.state`` as new tensors: those that are there must
        not be written to.
        """

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What stays of ``layer.state`` when the newest tokens are taken back; the default forgets everything."""
        return {}

    def _resolve(self, value: Budget, layer: LayerView) -> Tensor:
        tokens = [resolve_budget(value, n, layer.bytes_per_token) for n in layer.prompt_tokens.tolist()]
        return torch.tensor(tokens, dtype=torch.int32)
