"""Functions that ``torch.compile`` leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """``torch.compiler.disable`` that costs next to nothing where nothing is compiled; the original takes some µs."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_dynamo_compiling() else function)(*args, **kwargs)

    return cast(F, call)
