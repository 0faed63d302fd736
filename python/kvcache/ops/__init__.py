"""Typed wrappers of the native ops. Semantics, shapes and dtypes of every op: :mod:`kvcache.ops.reference`.

``KVCACHE_BACKEND=reference`` (read at import), :func:`set_backend` or :func:`use_backend` make every call run the
plain-torch reference instead, on any device and with the same checks of the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from kvcache import _C  # noqa: F401  # registers torch.ops.kvcache
from kvcache.ops import fake, reference, validation

__all__ = [
    "append",
    "backend",
    "choose_victims",
    "column_sums",
    "compact",
    "copy_pages",
    "decode_attention",
    "overwrite",
    "prefill_attention",
    "selection_scores",
    "set_backend",
    "topk",
    "use_backend",
]

fake.register()

_native = torch.ops.kvcache
# Bound once: finding the overload at every call costs 0.3 µs.
_append = _native.append.default
_copy_pages = _native.copy_pages.default
_compact = _native.compact.default
_overwrite = _native.overwrite.default
_decode_attention = _native.decode_attention.default
_prefill_attention = _native.prefill_attention.default
_column_sums = _native.column_sums.default
_selection_scores = _native.selection_scores.default
_topk = _native.topk.default
_choose_victims = _native.choose_victims.default

BACKENDS = ("native", "reference")
_use_reference = False


def backend() -> str:
    """``"native"`` or ``"reference"``."""
    return "reference" if _use_reference else "native"


def set_backend(name: str) -> None:
    """Choose what all later calls run."""
    global _use_reference
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, must be one of {', '.join(BACKENDS)}")
    _use_reference = name == "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for a block."""
    before = backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def _raise(error: RuntimeError) -> NoReturn:
    """The native ops' errors under their real type: torch passes on nothing but RuntimeError."""
    text = str(error)
    for kind in (ValueError, TypeError):
        mark = f"{kind.__name__}: "
        if text.startswith(mark):
            raise kind(text[len(mark) :].split("\nException raised from", 1)[0]) from None
    if "Expected a value of type" in text or "is missing value for argument" in text:
        raise TypeError(text) from None
    raise error


def append(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    k: Tensor,
    v: Tensor,
    new_positions: Tensor,
    new_columns: Tensor | None = None,
) -> None:
    """Write new tokens behind the entries of each head: :func:`kvcache.ops.reference.append`.

    ``k`` and ``v`` may have any strides with 1 in the last dimension and another dtype than the pages. A table too
    small for the new entries is a ValueError, and nothing has changed then.
    """
    if _use_reference:
        validation.append(k_pages, v_pages, table, counts, positions, columns, k, v, new_positions, new_columns)
        reference.append(k_pages, v_pages, table, counts, positions, columns, k, v, new_positions, new_columns)
        return
    try:
        _append(k_pages, v_pages, table, counts, positions, columns, k, v, new_positions, new_columns)
    except RuntimeError as error:
        _raise(error)


def copy_pages(k_pages: Tensor, v_pages: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole pages: :func:`kvcache.ops.reference.copy_pages`."""
    if _use_reference:
        validation.copy_pages(k_pages, v_pages, source, target)
        reference.copy_pages(k_pages, v_pages, source, target)
        return
    try:
        _copy_pages(k_pages, v_pages, source, target)
    except RuntimeError as error:
        _raise(error)


def compact(
    k_pages: Tensor,
    v_pages: Tensor,
    source_table: Tensor,
    target_table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    keep: Tensor,
    keep_counts: Tensor,
) -> None:
    """Keep only the listed slots of each head: :func:`kvcache.ops.reference.compact`.

    A page of ``target_table`` is either the source's page in the same column or a page that the source does not use.
    """
    args = (k_pages, v_pages, source_table, target_table, counts, positions, columns, keep, keep_counts)
    if _use_reference:
        validation.compact(*args)
        reference.compact(*args)
        return
    try:
        _compact(*args)
    except RuntimeError as error:
        _raise(error)


def overwrite(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    columns: Tensor,
    victims: Tensor,
) -> None:
    """Evict one entry per head, O(1): :func:`kvcache.ops.reference.overwrite`."""
    if _use_reference:
        validation.overwrite(k_pages, v_pages, table, counts, positions, columns, victims)
        reference.overwrite(k_pages, v_pages, table, counts, positions, columns, victims)
        return
    try:
        _overwrite(k_pages, v_pages, table, counts, positions, columns, victims)
    except RuntimeError as error:
        _raise(error)


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    index_counts: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries per row over the pages: :func:`kvcache.ops.reference.prefill_attention`."""
    args = (
        q, k_pages, v_pages, table, counts, positions, q_positions, window_start, sinks, bias, mask, index,
        index_counts, scale, softcap,
    )  # fmt: skip
    if _use_reference:
        validation.prefill_attention(*args)
        return reference.prefill_attention(*args)
    try:
        return _prefill_attention(*args)
    except RuntimeError as error:
        _raise(error)


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    window_start: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    index_counts: Tensor | None,
    statistics: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    statistics_decay: float = 1.0,
    statistics_max: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row: :func:`kvcache.ops.reference.decode_attention`."""
    args = (
        q, k_pages, v_pages, table, counts, positions, window_start, sinks, bias, index, index_counts, statistics,
        scale, softcap, statistics_decay, statistics_max,
    )  # fmt: skip
    if _use_reference:
        validation.decode_attention(*args)
        return reference.decode_attention(*args)
    try:
        return _decode_attention(*args)
    except RuntimeError as error:
        _raise(error)


def column_sums(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    lse: Tensor,
    window_start: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    last: int = 0,
    reduce_max: bool = False,
) -> Tensor:
    """Attention mass that each entry received: :func:`kvcache.ops.reference.column_sums`."""
    args = (
        q, k_pages, table, counts, positions, q_positions, lse, window_start, bias, mask, scale, softcap, last,
        reduce_max,
    )  # fmt: skip
    if _use_reference:
        validation.column_sums(*args)
        return reference.column_sums(*args)
    try:
        return _column_sums(*args)
    except RuntimeError as error:
        _raise(error)


def selection_scores(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool = True,
    per_head: bool = False,
) -> Tensor:
    """Score of each candidate entry for a query: :func:`kvcache.ops.reference.selection_scores`."""
    args = (q, k_pages, table, counts, positions, first, end, scale, soft, per_head)
    if _use_reference:
        validation.selection_scores(*args)
        return reference.selection_scores(*args)
    try:
        return _selection_scores(*args)
    except RuntimeError as error:
        _raise(error)


def topk(
    scores: Tensor,
    counts: Tensor,
    positions: Tensor,
    k: Tensor,
    first: Tensor,
    end: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Slots of the protected entries and the k best others, ascending: :func:`kvcache.ops.reference.topk`.

    ``scores``, ``positions``, ``counts`` and ``k`` may have any strides (1 in a third dimension): views and
    ``expand`` cost no copy.
    """
    if _use_reference:
        validation.topk(scores, counts, positions, k, first, end, width)
        return reference.topk(scores, counts, positions, k, first, end, width)
    try:
        return _topk(scores, counts, positions, k, first, end, width)
    except RuntimeError as error:
        _raise(error)


def choose_victims(
    scores: Tensor | None,
    counts: Tensor,
    positions: Tensor,
    budgets: Tensor,
    first: Tensor,
    end: Tensor,
) -> Tensor:
    """The slot that each head over its budget gives up: :func:`kvcache.ops.reference.choose_victims`.

    Strides as for :func:`topk`.
    """
    if _use_reference:
        validation.choose_victims(scores, counts, positions, budgets, first, end)
        return reference.choose_victims(scores, counts, positions, budgets, first, end)
    try:
        return _choose_victims(scores, counts, positions, budgets, first, end)
    except RuntimeError as error:
        _raise(error)


if "KVCACHE_BACKEND" in os.environ:
    try:
        set_backend(os.environ["KVCACHE_BACKEND"])
    except ValueError as _error:
        raise ImportError(f"KVCACHE_BACKEND: {_error}") from None
