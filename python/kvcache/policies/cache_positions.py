"""CachePositions: what is kept stands close together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Policy
from .card import Card


@dataclass(frozen=True)
class CachePositions(Policy):
    """Keys and queries are rotated by their place in the cache, whatever another policy keeps there:
    ``streamingllm(sinks=4, window=1020) | cachepositions``.

    Source: StreamingLLM, arXiv 2309.17453, section 3.2; the ``streaming`` variant of the official H2O code. Keys are
    stored without their rotation; a step rotates those of a head by 0, 1, ..., n - 1 in the order of tokens, the new
    ones included, and every query by the place of its own token. No position exceeds what a head holds, so that a model
    can go on beyond the length that it was trained for. Heads that keep different tokens count differently.

    As long as nothing was evicted, nothing changes. Statistics are those of the attention that is computed so; policies
    that look at keys see them at their original positions. Models whose rotation is not known, with sliding windows,
    with latent attention (MLA) or that compute attention themselves are refused at ``wrap``.
    """

    card: ClassVar[Card | None] = Card(
        source="arXiv 2309.17453, section 3.2; the streaming variant of H2O's code",
        rule="Keys and queries are rotated by their place in the cache: 0, 1, ... in the order of what a head holds.",
        holds="what another policy keeps",
        cost="reading, rotating and copying all keys and values; no graph",
        use="Joined to `streamingllm` or another that evicts: streams beyond the length that a model was trained for.",
    )

    relocates = True
