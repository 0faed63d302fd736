"""SnapKV: what the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .card import Card
from .observation import _ObservationWindow


@dataclass(frozen=True)
class SnapKV(_ObservationWindow):
    """Keep of a prompt its last ``window`` tokens and the entries to which these attend (arXiv 2404.14469, section 4).

    The score of an entry is the attention probability given by the last ``window`` queries of the prompt, summed, the
    mean over the query heads of a kv head, pooled over its neighbours by position. Each kv head keeps the ``keep`` -
    ``window`` best and the window. Nothing that is generated leaves, until another prompt (the next turn of a chat) is
    compressed together with it; its own last queries decide then, alone.

    Arguments
        keep: entries per kv head at the end of a prompt: an int, a share of the prompt, or bytes. More than ``window``;
            where a share or bytes come to less, the newest ones alone are kept.
        window: queries that observe, and newest tokens that stay. A shorter prompt observes with what it has.
        pool: neighbours, the entry in the middle, that are pooled; odd; 1: none. Neighbours in the list of what is
            held; beyond its ends and inside the window lie zeros.
        pooling: "avg" (the official code) or "max" (what the paper calls it). The mean over a group comes first.
        generated: "keep" (the paper), or "evict": the budget also holds while decoding. Generated tokens have no score
            then, except from pooled neighbours, and the last ``window`` ones are protected: the budget is what the
            prompt's window chose, and the newest.

    Defaults are those of the official code. A prompt read in chunks is the prompt read at once, with two exceptions:
    ``prefill="chunked"`` lets the last ``window`` queries of every chunk decide, the last one having perhaps fewer; and
    rows padded on the right are observed by those of their last chunk that lie in the last ``window`` columns.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2404.14469, section 4",
        rule=(
            "Attention of the prompt's last `window` queries, summed, group mean, pooled over `pool` neighbours; the "
            "best `keep - window` and the window stay."
        ),
        holds="`keep` of the prompt, and what is generated",
        cost="nothing after the prompt",
        use="The question stands at the prompt's end. If it comes later, the window votes for something else.",
    )
