"""What policies must know of a model before they work on it, found by reading a sample of text with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .attention import cache_argument, parameters_of
from .cache import KVCache
from .layer_state import LayerView
from .layers import wrapped_state
from .policies.base import Policy
from .wrap import unwrap, wrap


@dataclass(frozen=True)
class _QueryMoments(Policy):
    """Keeps everything, and of every query head the sum of its queries and of their outer products."""

    def observe(self, layer: LayerView, queries: Tensor, positions: Tensor) -> None:
        q = queries.float()
        for name, new in (("total", q.sum(2)), ("outer", q.transpose(2, 3) @ q)):
            layer.state[name] = layer.state[name] + new if name in layer.state else new


def calibrate_qfilters(
    model: PreTrainedModel, input_ids: Tensor | Sequence[Tensor], path: str | os.PathLike[str]
) -> Path:
    """Make the file of filters that :class:`kvcache.QFilters` reads (arXiv 2503.02812, section 3.2); returns its path.

    Of every query head the first right singular vector of its queries over ``input_ids`` is taken, on the side to which
    they point on the average; the filter of a kv head is minus the mean over its query heads.

    Arguments
        model: a model that :func:`kvcache.wrap` takes, wrapped or not; afterwards it is what it was.
        input_ids: text to read, int64 [rows, tokens] without padding, or several of these. Queries are taken as the
            model rotates them, so texts should be about as long as those that the filters are for.
        path: the ``.safetensors`` file to write: one tensor ``q_filters`` [layers, kv heads, channels] float32.

    Raises TypeError or ValueError, before anything is read, for other arguments and for models whose layers do not all
    attend by queries and keys alike (recurrent layers, latent attention) or are shared by tensor-parallel ranks.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {target}")
    texts = check_texts(input_ids)
    with _ready(model), torch.no_grad():
        state = wrapped_state(model)
        assert state is not None
        name = type(model).__name__
        if state.parallel is not None:
            raise ValueError(f"{name} is shared by tensor-parallel ranks: calibrate it on one")
        if set(state.tiers.values()) != {"handle"}:
            raise ValueError(f"{name} has layers without queries and keys of their own: there is nothing to calibrate")
        decoder = model.base_model
        argument = cache_argument(parameters_of(type(decoder).forward))
        moments: dict[int, list[Tensor]] = {}
        for text in texts:
            cache = KVCache(model, _QueryMoments())
            decoder(input_ids=text.to(model.device), **{argument: cache})
            for layer in cache.engine.layers:
                new = [layer.state[key].double().sum(0).cpu() for key in ("total", "outer")]
                moments[layer.index] = [a + b for a, b in zip(moments.get(layer.index, (0.0, 0.0)), new)]
                groups = layer.group
        filters = []
        for total, outer in (moments[i] for i in sorted(moments)):
            direction = torch.linalg.eigh(outer).eigenvectors[..., -1]  # of Q^T Q: the right singular vectors of Q
            side = torch.where((direction * total).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            filters.append(-(direction * side).unflatten(0, (-1, groups)).mean(1))
    save_file({"q_filters": torch.stack(filters).float().contiguous()}, target)
    return target


def check_texts(input_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Texts to calibrate on, as a list; ValueError naming ``input_ids`` unless they are token ids [rows, tokens]."""
    texts = [input_ids] if isinstance(input_ids, Tensor) else list(input_ids)
    for text in texts:
        if not isinstance(text, Tensor) or text.ndim != 2 or text.is_floating_point() or not text.numel():
            shape = list(text.shape) if isinstance(text, Tensor) else text
            raise ValueError(f"input_ids must be token ids [rows, tokens], or several of these, got {shape!r}")
    if not texts:
        raise ValueError("input_ids is empty: there is nothing to read")
    return texts


@contextmanager
def _ready(model: PreTrainedModel) -> Iterator[None]:
    """A model that is wrapped and does not train, for a block."""
    fresh, training = wrapped_state(model) is None, getattr(model, "training", False)
    if fresh:
        wrap(model)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if fresh:
            unwrap(model)
