"""What retention gates are trained on by default: the tasks and the documentation of
:mod:`kvcache.evaluation.tasks`, or a text. Every batch is drawn from the seed and its number alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from .tasks import Kind, TaskGenerator, decode, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..gate_training import Batches, GateRecipe

__all__ = ["batches_for"]

#: Weights of the tasks: half of the sequences ask for what lies far back, the others keep language as it is.
MIX = {"passkey": 1.0, "text": 1.0, "two_hop": 0.5, "frequent_words": 0.3, "copy": 0.3, "recall": 0.3}


def batches_for(model: PreTrainedModel, recipe: GateRecipe, text: str | None = None, tokenizer: Any = None) -> Batches:
    """Batches for :func:`kvcache.train_gates`: windows of ``text``, or the tasks, by the model's tokenizer.

    Raises ValueError when no tokenizer is known, or ``text`` has fewer tokens than a sequence.
    """
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError(f"tokenizer: this {type(model).__name__} comes from no folder; pass one, or batches")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    if text is not None:
        return _windows(np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"]), recipe, tokenizer)
    if _speaks_bytes(tokenizer):
        return _byte_tasks(recipe)
    return _tokenised_tasks(recipe, tokenizer)


def _speaks_bytes(tokenizer: Any) -> bool:
    """Whether a token is a byte, as in the shipped model: then it is known which tokens are answers."""
    return list(tokenizer("#abc:WXYZ; ~")["input_ids"]) == encode("#abc:WXYZ; ~").tolist()


def _even(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Every target but the first token weighs the same."""
    weights = torch.full(tokens.shape, 1.0 / (tokens.shape[0] * (tokens.shape[1] - 1)))
    weights[:, 0] = 0.0
    return torch.from_numpy(tokens.astype(np.int64)), weights


def _byte_tasks(recipe: GateRecipe) -> Batches:
    def draw(step: int) -> tuple[Tensor, Tensor]:
        tokens, kinds = TaskGenerator((recipe.seed, step)).batch(recipe.batch, recipe.length, MIX)
        # Two means, as in the training of the model: the few answers weigh as much as all the text around them.
        weights = np.zeros(kinds.shape, np.float32)
        for chosen in (kinds == Kind.TEXT, kinds > Kind.TEXT):
            weights += chosen / max(int(chosen.sum()), 1)
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    return draw


def _begins(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of every text."""
    plain, whole = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
    return list(whole[: len(whole) - len(plain)]) if list(whole[len(whole) - len(plain) :]) == list(plain) else []


def _tokenised_tasks(recipe: GateRecipe, tokenizer: Any) -> Batches:
    """The tasks as text. The questions come last, so that what is too long loses its beginning."""
    first = _begins(tokenizer)
    names, shares = list(MIX), np.array(list(MIX.values())) / sum(MIX.values())

    def sequence(generator: TaskGenerator, task: str, length: int) -> list[int]:
        for width in (4 * length, 8 * length, 16 * length):
            text = decode(generator.sample(task, width).tokens[1:])
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) >= length:
                return ids[len(ids) - length :]
        raise ValueError(
            f"tokenizer: it makes {len(ids)} tokens of {width} letters of the task {task}; pass text or batches"
        )

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = TaskGenerator((recipe.seed, step))
        drawn = np.random.default_rng((recipe.seed, step, 1)).choice(len(names), recipe.batch, p=shares)
        room = recipe.length - len(first)
        return _even(np.array([[*first, *sequence(generator, names[i], room)] for i in drawn]))

    return draw


def _windows(ids: np.ndarray, recipe: GateRecipe, tokenizer: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
    first = _begins(tokenizer)
    room = recipe.length - len(first)
    if len(ids) < room:
        raise ValueError(f"text has {len(ids)} tokens, fewer than a sequence of length={recipe.length}")

    def draw(step: int) -> tuple[Tensor, Tensor]:
        starts = np.random.default_rng((recipe.seed, step)).integers(0, len(ids) - room + 1, recipe.batch)
        return _even(np.stack([np.concatenate([first, ids[s : s + room]]) for s in starts]))

    return draw
