"""Budgets: how many entries a policy may keep, as tokens, as a share of the prompt, or as bytes."""

from __future__ import annotations

import math
import re

Budget = int | float | str
"""An int counts tokens, a float in (0, 1] is a share of the prompt, text such as ``"512MiB"`` is bytes of the cache."""

#: What no number of entries and no position reaches: the budget of a head that keeps everything.
FAR = 2**31 - 1

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes meant by ``"512MiB"``, ``"1.5 GB"`` or ``"4096B"``; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?)?B\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size in bytes; write for example '512MiB' or '2GB'")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def check_budget(name: str, value: object, *, zero: bool = False) -> None:
    """Raise TypeError or ValueError naming ``name`` unless ``value`` is a budget; an int 0 only if ``zero``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name} must be an int (tokens), a float (share of the prompt) or text (bytes), got {value!r}")
    if isinstance(value, str):
        if parse_bytes(value) <= 0:
            raise ValueError(f"{name} must be more than 0 bytes, got {value!r}")
    elif isinstance(value, int):
        if value < (0 if zero else 1):
            raise ValueError(f"{name} must be at least {0 if zero else 1} tokens, got {value}")
    elif math.isnan(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} as a share of the prompt must be in (0, 1], got {value}")


def check_count(name: str, value: object, minimum: int = 0) -> None:
    """Raise TypeError or ValueError naming ``name`` unless ``value`` is an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_pool(pool: object, entry: str = "an entry") -> None:
    """Raise TypeError or ValueError unless ``pool`` is an odd int of at least 1; ``entry``: what is pooled."""
    check_count("pool", pool, 1)
    if isinstance(pool, int) and pool % 2 == 0:
        raise ValueError(f"pool must be odd, so that {entry} is the middle of its neighbours, got {pool}")


def check_window(window: object, keep: object) -> None:
    """Raise TypeError or ValueError unless ``window`` is an int of at least 1, and below a ``keep`` of entries."""
    check_count("window", window, 1)
    if isinstance(keep, int) and isinstance(window, int) and keep <= window:
        raise ValueError(f"keep must be more than window, which stays in any case; got {keep} <= {window}")


def resolve_budget(value: Budget, prompt_tokens: int, bytes_per_token: int) -> int:
    """Tokens that ``value`` grants a row whose prompt has ``prompt_tokens`` tokens.

    ``bytes_per_token`` is what one token costs in all layers and heads of one row: a budget in bytes is spread evenly
    over them. A share is rounded down, as in the official H2O code.
    """
    if isinstance(value, str):
        return parse_bytes(value) // max(bytes_per_token, 1)
    if isinstance(value, int):
        return value
    return int(value * prompt_tokens)
