"""Typed wrappers of the native ops. Semantics, shapes and dtypes of every op: :mod:`kvcache.ops.reference`.

``KVCACHE_BACKEND=reference`` (read at import), :func:`set_backend` or :func:`use_backend` make every call run the
plain-torch reference instead, on any device and with the same checks of the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvcache import _C  # noqa: F401  # registers torch.ops.kvcache
from kvcache.ops import fake, reference, validation

__all__ = [
    "OPS",
    "active_rows",
    "append",
    "backend",
    "choose_victims",
    "column_sums",
    "compact",
    "copy_pages",
    "decode_attention",
    "evict",
    "gather_rows",
    "latent_attention",
    "overwrite",
    "page_bounds",
    "page_scores",
    "plan_decode",
    "prefill_attention",
    "query_similarity",
    "register_backend",
    "scatter_rows",
    "select_tokens",
    "selection_scores",
    "set_backend",
    "topk",
    "use_backend",
]

#: The ops, by name.
OPS = (
    "active_rows",
    "append",
    "choose_victims",
    "column_sums",
    "compact",
    "copy_pages",
    "decode_attention",
    "evict",
    "gather_rows",
    "latent_attention",
    "overwrite",
    "page_bounds",
    "page_scores",
    "plan_decode",
    "prefill_attention",
    "query_similarity",
    "scatter_rows",
    "select_tokens",
    "selection_scores",
    "topk",
)


class _Overloads:
    """The ops of one backend, bound once: finding an overload at every call costs 0.3 µs."""

    def __init__(self, namespace: Any) -> None:
        for name in OPS:
            setattr(self, name, getattr(namespace, name).default)

    def __getattr__(self, name: str) -> Callable[..., Any]:  # for the type checker
        raise AttributeError(name)


fake.register("kvcache")
_backends: dict[str, _Overloads | None] = {"native": _Overloads(torch.ops.kvcache), "reference": None}
_backend = "native"
_native = _backends["native"]


def backend() -> str:
    """The name of the backend in use, ``"native"`` unless changed."""
    return _backend


def register_backend(name: str, namespace: Any) -> None:
    """Add a backend: a namespace with the ops of ``torch.ops.kvcache``, e.g. the emulated CUDA kernels of the tests."""
    _backends[name] = _Overloads(namespace)


def set_backend(name: str) -> None:
    """Choose what all later calls run: "native" (kernels for the tensors' device), "reference" or a registered one."""
    global _backend, _native
    if name not in _backends:
        raise ValueError(f"unknown backend {name!r}, must be one of {', '.join(_backends)}")
    _backend, _native = name, _backends[name]


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
    bounds: Tensor | None = None,
) -> None:
    """Write new tokens behind the entries of each head: :func:`kvcache.ops.reference.append`.

    ``k`` and ``v`` may have any strides with 1 in the last dimension and another dtype than the pages. A table too
    small for the new entries is a ValueError, and nothing has changed then.
    """
    args = (k_pages, v_pages, table, counts, positions, columns, k, v, new_positions, new_columns, bounds)
    if _native is None:
        validation.append(*args)
        reference.append(*args)
        return
    try:
        _native.append(*args)
    except RuntimeError as error:
        _raise(error)


def copy_pages(k_pages: Tensor, v_pages: Tensor, source: Tensor, target: Tensor, bounds: Tensor | None = None) -> None:
    """Copy whole pages: :func:`kvcache.ops.reference.copy_pages`."""
    args = (k_pages, v_pages, source, target, bounds)
    if _native is None:
        validation.copy_pages(*args)
        reference.copy_pages(*args)
        return
    try:
        _native.copy_pages(*args)
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
    bounds: Tensor | None = None,
) -> None:
    """Keep only the listed slots of each head: :func:`kvcache.ops.reference.compact`.

    A page of ``target_table`` is either the source's page in the same column or a page that the source does not use.
    """
    args = (k_pages, v_pages, source_table, target_table, counts, positions, columns, keep, keep_counts, bounds)
    if _native is None:
        validation.compact(*args)
        reference.compact(*args)
        return
    try:
        _native.compact(*args)
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
    bounds: Tensor | None = None,
) -> None:
    """Evict one entry per head, O(1): :func:`kvcache.ops.reference.overwrite`."""
    args = (k_pages, v_pages, table, counts, positions, columns, victims, bounds)
    if _native is None:
        validation.overwrite(*args)
        reference.overwrite(*args)
        return
    try:
        _native.overwrite(*args)
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
    if _native is None:
        validation.prefill_attention(*args)
        return reference.prefill_attention(*args)
    try:
        return _native.prefill_attention(*args)
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
    index_pages: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row: :func:`kvcache.ops.reference.decode_attention`."""
    args = (
        q, k_pages, v_pages, table, counts, positions, window_start, sinks, bias, index, index_counts, statistics,
        scale, softcap, statistics_decay, statistics_max, index_pages, plan,
    )  # fmt: skip
    if _native is None:
        validation.decode_attention(*args)
        return reference.decode_attention(*args)
    try:
        return _native.decode_attention(*args)
    except RuntimeError as error:
        _raise(error)


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor | None,
    window_start: Tensor | None,
    statistics: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    statistics_decay: float = 1.0,
    statistics_max: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in the latent space of MLA: :func:`kvcache.ops.reference.latent_attention`."""
    args = (
        q_latent, q_rope, k_pages, v_pages, table, counts, positions, q_positions, window_start, statistics, scale,
        softcap, statistics_decay, statistics_max, plan,
    )  # fmt: skip
    if _native is None:
        validation.latent_attention(*args)
        return reference.latent_attention(*args)
    try:
        return _native.latent_attention(*args)
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
    if _native is None:
        validation.column_sums(*args)
        return reference.column_sums(*args)
    try:
        return _native.column_sums(*args)
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
    pages: Tensor | None = None,
    page_counts: Tensor | None = None,
) -> Tensor:
    """Score of each candidate entry for a query: :func:`kvcache.ops.reference.selection_scores`."""
    args = (q, k_pages, table, counts, positions, first, end, scale, soft, per_head, pages, page_counts)
    if _native is None:
        validation.selection_scores(*args)
        return reference.selection_scores(*args)
    try:
        return _native.selection_scores(*args)
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
    pages: Tensor | None = None,
    page_counts: Tensor | None = None,
    page_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Slots of the protected entries and the k best others, ascending: :func:`kvcache.ops.reference.topk`.

    ``scores``, ``positions``, ``counts`` and ``k`` may have any strides (1 in a third dimension): views and
    ``expand`` cost no copy.
    """
    args = (scores, counts, positions, k, first, end, width, pages, page_counts, page_size)
    if _native is None:
        validation.topk(*args)
        return reference.topk(*args)
    try:
        return _native.topk(*args)
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
    if _native is None:
        validation.choose_victims(scores, counts, positions, budgets, first, end)
        return reference.choose_victims(scores, counts, positions, budgets, first, end)
    try:
        return _native.choose_victims(scores, counts, positions, budgets, first, end)
    except RuntimeError as error:
        _raise(error)


def evict(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Sequence[Tensor],
    counts: Sequence[Tensor],
    positions: Sequence[Tensor],
    columns: Sequence[Tensor],
    scores: Sequence[Tensor | None],
    budgets: Sequence[Tensor],
    first: Sequence[Tensor],
    end: Sequence[Tensor],
    bounds: Tensor | None = None,
) -> None:
    """Evict at most one entry per head of all layers, unseen by the host: :func:`kvcache.ops.reference.evict`.

    Lists of one tensor per layer. On a GPU one launch for 40 layers, two where heads are few and long.
    """
    args = (k_pages, v_pages, table, counts, positions, columns, scores, budgets, first, end, bounds)
    if _native is None:
        validation.evict(*args)
        reference.evict(*args)
        return
    try:
        _native.evict(*args)
    except RuntimeError as error:
        _raise(error)


def page_bounds(k_pages: Tensor, table: Tensor, counts: Tensor, bounds: Tensor) -> None:
    """Recompute the smallest and largest key of each live page: :func:`kvcache.ops.reference.page_bounds`."""
    args = (k_pages, table, counts, bounds)
    if _native is None:
        validation.page_bounds(*args)
        reference.page_bounds(*args)
        return
    try:
        _native.page_bounds(*args)
    except RuntimeError as error:
        _raise(error)


def page_scores(
    q: Tensor,
    bounds: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    soft: bool = True,
    per_head: bool = False,
) -> Tensor:
    """Score of each page from the bounds of its keys: :func:`kvcache.ops.reference.page_scores`."""
    args = (q, bounds, table, counts, positions, first, end, scale, soft, per_head)
    if _native is None:
        validation.page_scores(*args)
        return reference.page_scores(*args)
    try:
        return _native.page_scores(*args)
    except RuntimeError as error:
        _raise(error)


def plan_decode(counts: Tensor, added: int, most: int, workers: int = 0) -> Tensor:
    """How decode attention shares out the entries of all layers: :func:`kvcache.ops.reference.plan_decode`."""
    args = (counts, added, most, workers)
    if _native is None:
        validation.plan_decode(*args)
        return reference.plan_decode(*args)
    try:
        return _native.plan_decode(*args)
    except RuntimeError as error:
        _raise(error)


def query_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two queries over all their heads: :func:`kvcache.ops.reference.query_similarity`."""
    args = (a, b)
    if _native is None:
        validation.query_similarity(*args)
        return reference.query_similarity(*args)
    try:
        return _native.query_similarity(*args)
    except RuntimeError as error:
        _raise(error)


def select_tokens(
    q: Tensor,
    k_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    positions: Tensor,
    q_positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bounds: Tensor | None,
    query: Tensor,
    index: Tensor,
    index_counts: Tensor,
    until: Tensor,
    at: Tensor,
    events: Tensor,
    sinks: int,
    k: int,
    local: int,
    reuse: float,
    scale: float = 1.0,
    soft: bool = True,
    shortlist: int = 0,
) -> None:
    """A decode step of TokenSelect, its lists updated in place: :func:`kvcache.ops.reference.select_tokens`."""
    args = (
        q, k_pages, table, counts, positions, q_positions, cos, sin, bounds, query, index, index_counts, until, at,
        events, sinks, k, local, reuse, scale, soft, shortlist,
    )  # fmt: skip
    if _native is None:
        validation.select_tokens(*args)
        reference.select_tokens(*args)
        return
    try:
        _native.select_tokens(*args)
    except RuntimeError as error:
        _raise(error)


def active_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the true elements of a mask: :func:`kvcache.ops.reference.active_rows`."""
    args = (mask,)
    if _native is None:
        validation.active_rows(*args)
        return reference.active_rows(*args)
    try:
        return _native.active_rows(*args)
    except RuntimeError as error:
        _raise(error)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a matrix by number: :func:`kvcache.ops.reference.gather_rows`."""
    args = (x, index)
    if _native is None:
        validation.gather_rows(*args)
        return reference.gather_rows(*args)
    try:
        return _native.gather_rows(*args)
    except RuntimeError as error:
        _raise(error)


def scatter_rows(x: Tensor, rows: Tensor, index: Tensor) -> None:
    """Put rows of a matrix back by number: :func:`kvcache.ops.reference.scatter_rows`."""
    args = (x, rows, index)
    if _native is None:
        validation.scatter_rows(*args)
        reference.scatter_rows(*args)
        return
    try:
        _native.scatter_rows(*args)
    except RuntimeError as error:
        _raise(error)


if "KVCACHE_BACKEND" in os.environ:
    try:
        set_backend(os.environ["KVCACHE_BACKEND"])
    except ValueError as _error:
        raise ImportError(f"KVCACHE_BACKEND: {_error}") from None
