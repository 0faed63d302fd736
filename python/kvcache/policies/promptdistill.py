"""PromptDistill: later layers run the tokens of a prompt that its last query asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Policy
from .budget import check_budget, check_count, check_pool
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView


@dataclass(frozen=True)
class PromptDistill(Policy):
    """Drop most tokens of a prompt after an early layer (arXiv 2503.23274, section 3; official code models/llama.py).

    After layer r a prompt's last token e decides: every earlier token j of this prompt gets the mean over the query
    heads of q_h . k_j / sqrt(D), without a softmax; its average over ``pool`` neighbours, where e and what lies beyond
    the ends counts as 0, is its score. The ``keep`` best and e run the layers behind r, at their own positions; the
    others keep their hidden state and leave no entry there. Decoding reads, in every layer, what that layer holds.

    Arguments
        layer: r, from 0, or one layer for each stage, ascending; a later stage chooses among what the earlier one left.
        keep: tokens of a prompt beside e that go on: an int, or a share of the prompt (rounded down, at least one); as
            many values as stages, falling.
        pool: neighbours, the token in the middle, whose scores are averaged; odd; 1: none.
        truncate: stages whose layers also lose what the stage dropped, once the prompt has been read, so that they hold
            as little as the next ones; 0: none, -1: all. Other than 0 it decides what stays and cannot be combined
            with a policy that evicts.

    ``layer`` and ``keep`` have the defaults of the paper's evaluation, of models of 32 layers, the others those of the
    official code. Every forward of several tokens is a prompt: a later turn of a chat drops tokens of its
    own, by its own last query. A prompt must come at once. Logits at dropped tokens come from an early layer and mean
    nothing; those at e are what generation needs.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2503.23274, section 3",
        rule=(
            "After `layer` the prompt's last token e scores the earlier ones: mean over query heads of q_e·k_j / √D, "
            "averaged over `pool` neighbours; the `keep` best and e run the later layers."
        ),
        holds="later layers: `keep + 1` of the prompt; the first: all, or as much (`truncate`); and what follows",
        cost="nothing; a prompt takes less",
        use="Long prompts that end with the question: later layers read little of them. Not for prompts in chunks.",
    )

    layer: int | tuple[int, ...] = 13
    keep: int | float | tuple[int | float, ...] = 1024
    pool: int = 5
    _: KW_ONLY
    truncate: int = 0

    generated = "keep"

    def __post_init__(self) -> None:
        for r in self.routes_after:
            check_count("layer", r)
        for k in self._keeps:
            if isinstance(k, str):
                raise TypeError(f"keep must be an int (tokens) or a float (share of the prompt), got {k!r}")
            check_budget("keep", k)
        if not self.routes_after or any(a >= b for a, b in pairwise(self.routes_after)):
            raise ValueError(f"layer must name at least one layer, in ascending order, got {self.layer!r}")
        if len(self._keeps) != len(self.routes_after):
            raise ValueError(f"keep must have one value per stage, {len(self.routes_after)} in all, got {self.keep!r}")
        if any(type(a) is type(b) and a <= b for a, b in pairwise(self._keeps)):
            raise ValueError(f"keep must fall from stage to stage, got {self.keep!r}")
        check_pool(self.pool, "a token")
        check_count("truncate", self.truncate, -1)
        if self.truncate > len(self.routes_after):
            raise ValueError(f"truncate must be at most the {len(self.routes_after)} stages, got {self.truncate}")

    @property
    def routes_after(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    @property
    def _keeps(self) -> tuple[int | float, ...]:
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    def check(self, num_layers: int) -> None:
        check_layers(self, self.routes_after, num_layers)

    def route(self, layer: LayerView, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor | None:
        stage = self.routes_after.index(layer.index)
        first, end = (x.to(positions.device)[:, None] for x in layer.prompt_span)
        wanted = self._keeps[stage]
        k = (wanted * (end - first)).int().clamp(min=1) if isinstance(wanted, float) else wanted
        # Padding moves no neighbours: real tokens first.
        order = (positions < 0).int().argsort(dim=1, stable=True)
        places = positions.gather(1, order)
        candidates = (places >= 0) & (places < end - 1)
        last = (positions == end - 1).int().argmax(1)
        query = queries[torch.arange(len(last), device=last.device), :, last]
        scores = pooled(self._logits(layer, query, keys).gather(1, order), candidates, self.pool)
        best = scores.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(best).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        kept = (candidates & (rank < k)) | (places >= end - 1)
        kept = torch.empty_like(kept).scatter_(1, order, kept)
        if stage < (self.truncate if self.truncate >= 0 else len(self.routes_after)):
            start = 0 if stage == 0 else self.routes_after[stage - 1] + 1
            for index in range(start, layer.index + 1):
                self._mark(layer.of_layer(index), positions, kept, first, end)
        return kept

    @staticmethod
    def _logits(layer: LayerView, query: Tensor, keys: Tensor) -> Tensor:
        """Mean over the query heads of q . k / sqrt(D), [rows, T] float32, for ``query`` [rows, query_heads, D]."""
        rows, heads, tokens, dim = keys.shape
        groups = query.float().view(rows, heads, -1, dim).sum(2)  # heads of a group meet the same keys
        x = torch.zeros(rows, tokens, device=keys.device)
        for h in range(heads):  # one at a time: no float32 copy of all keys
            x += (keys[:, h].float() @ groups[:, h, :, None])[..., 0]
        return layer.over_heads(x) / (layer.group * layer.all_heads * dim**0.5)

    # -- truncation: retention of what the stages chose -------------------------------------------------------------

    @property
    def retains(self) -> bool:
        return self.truncate != 0

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("dropped",) if self.retains else ()

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        return {"dropped": torch.zeros(keys.shape[:3], device=keys.device)}

    @staticmethod
    def _mark(layer: LayerView, positions: Tensor, kept: Tensor, first: Tensor, end: Tensor) -> None:
        """Note which entries of this prompt the stage has dropped; they leave when it is known to be complete."""
        tokens = int((end - first).max())
        gone = torch.zeros(len(positions), tokens + 1, device=positions.device)  # the last place: none of these tokens
        gone.scatter_(1, torch.where((positions >= 0) & ~kept, positions - first, tokens).long(), 1.0)
        gone[:, -1] = 0.0
        place = layer.positions - first[:, :, None]
        inside = (place >= 0) & (place < tokens)
        found = gone[:, None].expand(-1, layer.heads, -1).gather(2, place.clamp(0, tokens).long())
        column = layer.column("dropped")
        column.copy_(torch.where(inside, found, column))

    def allocate(self, layer: LayerView) -> Tensor:
        return (layer.live & (layer.column("dropped") == 0)).sum(2).clamp(min=1)

    def score(self, layer: LayerView) -> Tensor | None:
        return -layer.column("dropped")


def pooled(x: Tensor, candidates: Tensor, pool: int) -> Tensor:
    """``x`` [rows, n] averaged over ``pool`` neighbours; others than ``candidates`` count as 0 and get -inf."""
    scores = F.avg_pool1d(torch.where(candidates, x, 0.0)[:, None], pool, 1, pool // 2)[:, 0]
    return scores.masked_fill(~candidates, float("-inf"))


def check_layers(policy: Policy, layers: tuple[int, ...], num_layers: int) -> None:
    """ValueError if one of ``layers`` is none of a model of ``num_layers`` decoder layers."""
    for r in layers:
        if r >= num_layers:
            raise ValueError(
                f"{policy}: there is no layer {r} among the {num_layers} decoder layers of this model, 0 to "
                f"{num_layers - 1}"
            )
