"""What retention policies with one budget share."""

from __future__ import annotations

from .base import Policy
from .budget import Budget, check_budget, check_count


class _Keeping(Policy):
    """``keep`` entries per kv head, the protected ones among them: ``sinks`` first and ``recent`` newest ones."""

    keep: Budget

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)
        check_count("sinks", self.sinks)
        check_budget("recent", self.recent, zero=True)
        check_count("slack", self.slack)

    @property
    def budget(self) -> Budget:  # type: ignore[override]
        return self.keep
