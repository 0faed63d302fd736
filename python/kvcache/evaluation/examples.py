"""What a policy is asked: a context, one or more questions about it, and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Example"]


@dataclass(frozen=True)
class Example:
    """A prompt for ``generate()`` and the answer it should give.

    ``prompt`` is int64 ``[length]`` and ends where the answer begins. ``question_start`` is the index in ``prompt``
    where the question begins, so that ``prompt[:question_start]`` is what a cache may be compressed to before the
    question is known; it is the prompt's length for tasks without a question.

    ``answer`` is int64 ``[n]``. Without ``references`` it is right only as a whole. With them the answer is text, of up
    to ``new_tokens`` tokens, that should contain every reference (in any case of letters).

    ``later``: further turns, whose ``prompt`` is what is said after the answer before.
    """

    prompt: np.ndarray
    answer: np.ndarray
    task: str
    question_start: int
    references: tuple[str, ...] = ()
    new_tokens: int = 0
    later: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if not self.new_tokens:
            object.__setattr__(self, "new_tokens", len(self.answer))

    @property
    def turns(self) -> tuple[Example, ...]:
        """This turn and the later ones."""
        return (self, *self.later)

    @property
    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """What rows of one batch must have in common."""
        return tuple((len(t.prompt), t.new_tokens, t.question_start) for t in self.turns)

    def score(self, said: np.ndarray, text: str) -> float:
        """How much of the answer is in ``said`` int64 ``[n]``, which reads ``text``: 0 to 1."""
        if not self.references:
            return float(np.array_equal(said[: len(self.answer)], self.answer))
        text = text.lower()
        return sum(reference.lower() in text for reference in self.references) / len(self.references)
