"""The small model that ships with kvcache."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

__all__ = ["load_model", "load_tokenizer", "shipped_folder"]


def shipped_folder() -> Path:
    """Folder of the shipped model and tokenizer, in the installed package. FileNotFoundError if it is missing."""
    folder = Path(str(resources.files(__package__) / "model"))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: this installation of kvcache is incomplete; "
            "python -m kvcache.evaluation.train --out FOLDER makes one, --model FOLDER uses it"
        )
    return folder


def load_model(folder: str | Path | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM in ``folder``, or of that name, for inference; default: the shipped byte-level one.

    ``dtype`` None: as stored, but the shipped model in float32: many CPUs have no fast bfloat16 arithmetic.
    """
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            dtype=dtype or ("auto" if folder else torch.float32), **_source(folder)
        )
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval()


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to :func:`load_model`."""
    return AutoTokenizer.from_pretrained(**_source(folder))


def _source(folder: str | Path | None) -> dict[str, Any]:
    """Where ``from_pretrained`` finds it; a folder that is there is not looked for on the hub."""
    name = str(folder or shipped_folder())
    return {"pretrained_model_name_or_path": name, "local_files_only": Path(name).exists()}
