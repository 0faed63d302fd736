"""Files with what a calibration of a model found: nested lists, or one tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_numbers(path: Path, name: str) -> Any:
    """What a ``.json`` file holds, or the one tensor of a ``.safetensors`` file; ValueError naming the argument
    ``name`` for any other."""
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {path}")
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: {path} is no JSON: {error}") from None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{name}: {path} is no safetensors file: {error}") from None
        if len(tensors) != 1:
            raise ValueError(f"{name}: {path} must hold one tensor, but holds {sorted(tensors)}")
        return next(iter(tensors.values()))
    raise ValueError(f"{name}: {path} must be a .json or a .safetensors file")
