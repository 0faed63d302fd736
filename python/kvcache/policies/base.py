"""The policy interface: what a policy may decide, and what it is shown when it decides.

A policy is an immutable description (a frozen dataclass); whatever it must remember between steps lives in the cache,
in the layer's side columns or in ``layer.state``. It never touches pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget, resolve_budget
from .card import Card

if TYPE_CHECKING:
    from ..layer_state import LayerView

NEEDS = frozenset({"attention_sums", "last_attention", "window_attention"})
REGISTRY: dict[str, type[Policy]] = {}


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


@dataclass(frozen=True)
class Merged:
    """What entries that stay become when others leave: ``slots`` [rows, heads, m] int64, distinct, -1 for none; their
    new ``keys`` [rows, heads, m, Dk], without rotation, and ``values`` [rows, heads, m, Dv]; None leaves them alone."""

    slots: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


class Policy:
    """Base of all policies. Subclass as a frozen dataclass and override what the policy decides.

    Class attributes
        needs: the statistic that the engine keeps in the score column of every entry, at most one of
            ``"attention_sums"`` (probability summed over all queries so far), ``"last_attention"`` (probability
            given by the newest query) and ``"window_attention"`` (probability summed over the last ``observed`` queries
            of the last prompt; later tokens change nothing and have 0). All are reduced over the query heads of a kv
            head with ``group_reduction``.
        generated: "evict": the budget holds at all times; "keep": only a prompt is brought within it, and what follows
            stays, whole, until the next prompt ends (as in papers that compress prompts).
        columns: names of further side columns, filled by :meth:`append_columns`.
        observes_generated: whether :meth:`observe` is shown the queries of generated tokens as well; such steps are not
            captured as graphs.
        needs_rotation: whether the policy takes the rotation off queries or keys; models without one that is known are
            refused.
        needs_output_projection: whether the policy reads ``layer.output_projection``; models where that is not known
            are refused.
        sinks, recent, budget: see :meth:`allocate`; ``budget`` None keeps everything.
        needs_hidden: whether :meth:`append_columns` reads ``layer.hidden``, the hidden states that entered the layer's
            attention module. Models whose attention does not go through transformers' interface are refused then.
        reallocates: whether budgets are shared out anew (:meth:`allocate_all`) whenever entries have to leave, not
            only at the end of a prompt. What a row may keep in all layers together must not change by that.
        slack: entries by which a head may exceed its budget while decoding. The first one beyond brings it back to the
            budget, so that ``score`` is asked once in ``slack`` + 1 tokens; for scores that take the whole layer to
            compute. The end of a prompt always leaves the budget. 0: every step evicts.
        card: what the catalogue says of it; only kvcache's own policies need one.
        merges_keys: whether :meth:`merge` changes keys, which takes a model whose rotation is known.
        relocates: whether what is kept, by whatever policy, is rotated by its place in the cache; likewise.

        routes_after: layers after which :meth:`route` is asked, ascending.
        scout: a policy whose :meth:`route`, first asked in a forward of its own that ends there, says which tokens of a
            prompt are read at all: the others count as padding, so that positions have no gaps.

    What a subclass may override
        score (retention), allocate (retention), merge (retention), select (selection), layers (layer schedule), route
        (token routing).
    """

    card: ClassVar[Card | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[tuple[str, ...]] = ()
    needs_hidden: ClassVar[bool] = False
    reallocates: bool = False
    observes_generated: ClassVar[bool] = False
    needs_rotation: ClassVar[bool] = False
    needs_output_projection: ClassVar[bool] = False
    observed: int = 0
    generated: str = "evict"
    group_reduction: str = "mean"
    budget: Budget | None = None
    sinks: int = 0
    recent: Budget = 0
    slack: int = 0
    routes_after: tuple[int, ...] = ()
    scout: Policy | None = None
    merges_keys: bool = False
    relocates: bool = False

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

    # -- retention: which entries stay ------------------------------------------------------------------------------

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

    @property
    def merges(self) -> bool:
        """Whether the policy folds what leaves into what stays."""
        return type(self).merge is not Policy.merge

    def merge(self, layer: LayerView, evicted: Tensor, kept: Tensor) -> Merged | None:
        """What ``kept`` entries become when the ``evicted`` ones leave, both [rows, heads, capacity] bool.

        Called whenever entries leave a layer without a sliding window (where they leave because no query will see them
        any more), with all of them still there; a head may lose none. The engine writes the result. None changes
        nothing. A crop does not undo what was merged.
        """
        return None

    def append_columns(self, layer: LayerView, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        """Values of the declared ``columns`` for new tokens with keys, values [rows, heads, T, D]: name -> [.., T]."""
        return {}

    @property
    def observes(self) -> bool:
        """Whether the policy wants to see queries: those of prompts, of all tokens with ``observes_generated``."""
        return type(self).observe is not Policy.observe

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        """See a prompt's ``queries`` [rows, query_heads, T, D], as the model rotated them, after they have attended.

        ``positions`` [rows, T] int32, -1: padding, or a token that is not accepted or skips the layer. Called for every
        part of a prompt. What is to be remembered goes into ``layer.state`` as new tensors: those that are there must
        not be written to.
        """

    def crop_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What stays of ``layer.state`` when the newest tokens are taken back; the default forgets everything."""
        return {}

    # -- selection: which entries this step reads -------------------------------------------------------------------

    @property
    def selects(self) -> bool:
        """Whether the policy chooses what each step reads."""
        return type(self).select is not Policy.select

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

    @property
    def positions(self) -> str:
        """How keys are rotated: by "original" positions; by their place in the list that is read ("compact"), or among
        all entries of their head ("cache")."""
        return "cache" if self.relocates else "original"

    @property
    def query_place(self) -> int:
        """Position by which queries are rotated when they vote under compact positions."""
        return 0

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

    # -- schedule: which layers run ---------------------------------------------------------------------------------

    @property
    def schedules(self) -> bool:
        """Whether the policy skips layers."""
        return type(self).layers is not Policy.layers

    def layers(self, num_layers: int, positions: Tensor, prompt: bool) -> Tensor | None:
        """Which tokens run which layer: bool [num_layers, rows, T] for ``positions`` [rows, T] int32; None: all.

        ``prompt``: the tokens belong to a prompt. A layer that a position runs must be run by all earlier ones.
        """
        return None

    # -- token routing: which tokens of a prompt go on ---------------------------------------------------------------

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

    def _resolve(self, value: Budget, layer: LayerView) -> Tensor:
        tokens = [resolve_budget(value, n, layer.bytes_per_token) for n in layer.prompt_tokens.tolist()]
        return torch.tensor(tokens, dtype=torch.int32)
