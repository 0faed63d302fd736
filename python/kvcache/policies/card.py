"""What the catalogue (docs/policies.md) says of a policy; needs and defaults it takes from the class itself."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Policy

__all__ = ["Card", "defaults", "needs"]

_STATISTICS = {
    "attention_sums": "attention sums",
    "last_attention": "attention of the newest query",
    "window_attention": "attention of the prompt's last queries",
}


@dataclass(frozen=True)
class Card:
    """One entry of the catalogue, in Markdown.

    Arguments
        source: where the rule comes from: paper and section.
        rule: the formula: which entries stay or are read, which layers run.
        holds: what a row holds between steps, entries per kv head or bytes; by that the cache is smaller.
        cost: what a decode step costs beyond reading what is held.
        use: when to take it, and when not.
    """

    source: str
    rule: str
    holds: str
    cost: str
    use: str


def defaults(policy: type[Policy]) -> str:
    """The arguments and their defaults as in the text form: ``keep=512, sinks=0``."""
    shown = []
    for f in fields(policy):  # type: ignore[arg-type]
        if f.init:
            default: Any = f.default if f.default is not MISSING else "…"
            shown.append(f"{f.name}={default!r}")
    return ", ".join(shown).replace("'", '"')


def needs(policy: type[Policy]) -> str:
    """What the engine must provide for it."""
    from .base import Policy

    found = [_STATISTICS[name] for name in sorted(policy.needs)]
    if policy.observe is not Policy.observe:
        found.append("queries of every step" if policy.observes_generated else "queries of the prompt")
    if policy.select is not Policy.select:
        found.append("the queries of every step")
    if policy.routes_after or policy.scout is not None:
        found.append("a prompt at once")
    if policy.needs_hidden:
        found.append("hidden states that enter attention")
    if policy.needs_rotation or policy.merges_keys or policy.relocates:
        found.append("a rotation that is known")
    if isinstance(policy.columns, tuple) and policy.columns:  # not where they depend on the arguments
        found.append("a number beside every entry")
    if policy.needs_output_projection:
        found.append("the output projection")
    return ", ".join(found)
