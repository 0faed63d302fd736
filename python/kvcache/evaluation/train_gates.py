"""``kvcache train-gates``: :func:`kvcache.train_gates` with progress on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..gate_training import GateRecipe, train_gates
from ..gates import Gates
from .console import console, ticking
from .loading import load_model, load_tokenizer

__all__ = ["run"]


def run(
    out: Path,
    *,
    folder: str | None = None,
    text: Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    resume: bool = False,
    save_every: int = 50,
    **recipe: Any,
) -> Gates:
    """Train gates for the model in ``folder`` (default: the shipped one) and write them to ``out``.

    ``text``: a file to train on instead of the tasks; ``recipe``: fields of :class:`kvcache.GateRecipe`. Raises
    ValueError naming what is wrong.
    """
    settings = GateRecipe(**recipe)  # before a model is loaded
    screen = console()
    if text is not None and not text.is_file():
        raise ValueError(f"--text: there is no file {text}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, getattr(torch, dtype) if dtype else None).to(device)
    with ticking(screen, settings.steps) as ticker:

        def progress(step: int, values: dict[str, float]) -> None:
            if step % 10 == 0 or step == settings.steps:
                shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                ticker.phase(f"step {step}  {shown}")
            ticker.tick()

        gates = train_gates(
            model,
            out,
            text=None if text is None else text.read_text("utf-8", "replace"),
            tokenizer=load_tokenizer(folder),
            resume=resume,
            save_every=save_every,
            progress=progress,
            **recipe,
        )
    screen.print(
        f"wrote {out}; use it with\n\n    kvcache.wrap(model, \"trimkv(gates='{out}', keep={settings.capacity})\")"
    )
    return gates
