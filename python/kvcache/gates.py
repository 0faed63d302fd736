"""Retention gates (TRIM-KV): small networks that say of every token how long each kv head should remember it."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Gates"]

#: The name of the file in a folder that is given in place of one.
FILE = "gates.safetensors"
_TENSOR = re.compile(r"layers\.(\d+)\.(inner|outer)\.(weight|bias)")


class _Gate(nn.Module):
    """The gate of one layer: its two matrices, as :class:`Gates` has them."""

    def __init__(self, hidden: int, heads: int, width: int, bias: float, generator: torch.Generator) -> None:
        super().__init__()
        # torch's own initialisation would move the generator that sampling draws from.
        self.inner = nn.utils.skip_init(nn.Linear, hidden, width)
        self.outer = nn.utils.skip_init(nn.Linear, width, heads)
        with torch.no_grad():
            self.inner.weight.uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.fill_(bias)


class Gates(nn.Module):
    """One gate per layer that caches keys and values (TRIM-KV, arXiv 2512.03324, section 4), in float32.

        beta = sigmoid(W2 SiLU(W1 h + b1) + b0),  one for each kv head,

    of the hidden state h that enters the layer's attention module. A token that lies ``age`` tokens back counts as
    remembered with beta ** age; beta near 1 stays for long, beta near 0 is forgotten at once.

    Arguments
        shapes: of each such layer of the model, the size of h and the number of kv heads.
        width: units between W1 and W2 (paper: 512).
        bias: what b0 begins with. W2 begins with 0, so that every beta begins with sigmoid(bias). The paper's 18
            remembers everything and leaves it slowly, for long training; 8 can be moved within some hundred steps.
        seed: of the initial W1.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], width: int = 512, bias: float = 8.0, seed: int = 0
    ) -> None:
        super().__init__()
        if not shapes:
            raise ValueError("shapes is empty: gates need at least one layer")
        self.width = width
        self.metadata: dict[str, str] = {}
        self.path: str | None = None  # the file that they were saved to or loaded from last
        self._copies: dict[torch.device, Gates] = {}
        generator = torch.Generator().manual_seed(seed)
        gates = {str(i): _Gate(*shapes[i], width, bias, generator) for i in sorted(shapes)}
        self.layers = nn.ModuleDict(gates)

    @property
    def shapes(self) -> dict[int, tuple[int, int]]:
        """Layer -> (size of the hidden state, kv heads)."""
        return {int(i): (self._gate(i).inner.in_features, self._gate(i).outer.out_features) for i in self.layers}

    def _gate(self, layer: int | str) -> _Gate:
        gate = self.layers[str(layer)]
        assert isinstance(gate, _Gate)
        return gate

    def log_beta(self, layer: int, hidden: Tensor) -> Tensor:
        """log beta of the tokens with hidden states ``hidden`` [rows, T, size]: [rows, heads, T] float32, at most 0."""
        gate = self._gate(layer)
        # In float32 whatever the model computes in: near 1, where betas that matter lie, they differ by little.
        return F.logsigmoid(gate.outer(F.silu(gate.inner(hidden.float())))).transpose(1, 2)

    def on(self, device: torch.device) -> Gates:
        """The same gates on ``device``: copied there once, and always at the same addresses (captured graphs)."""
        if next(self.parameters()).device == device:
            return self
        if device not in self._copies:
            self._copies[device] = copy.deepcopy(self).to(device)
        return self._copies[device]

    def __repr__(self) -> str:
        # As a value in the text form of a policy, which cannot be read again without a file.
        return repr("<gates in memory>" if self.path is None else self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    def check_layers(self, layers: Sequence[int], hidden_size: int | None) -> None:
        """ValueError unless the gates are for these ``layers`` and hidden states of ``hidden_size`` (None: unknown)."""
        if list(self.shapes) != list(layers):
            raise ValueError(f"gates are for layers {_ranges(self.shapes)}, the model caches in {_ranges(layers)}")
        for index, (size, _) in self.shapes.items():
            if hidden_size is not None and size != hidden_size:
                raise ValueError(
                    f"the gate of layer {index} takes hidden states of {size}, the model has {hidden_size}"
                )

    def check_heads(self, kv_heads: int) -> None:
        """ValueError unless every layer's gate has ``kv_heads`` outputs."""
        for index, (_, heads) in self.shapes.items():
            if heads != kv_heads:
                raise ValueError(
                    f"the gate of layer {index} is for {heads} kv heads, a layer of the model has {kv_heads}"
                )

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **metadata: object) -> Path:
        """Write the gates to ``path`` (a folder: to ``gates.safetensors`` in it) and return the file.

        ``metadata``: what else the file is to say about them, as JSON values; :meth:`load` gives it back as text.
        The file appears whole or not at all.
        """
        file = file_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {**self.metadata, **{k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}}
        tensors = {k: v.detach().float().cpu().contiguous() for k, v in self.state_dict().items()}
        staging = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(tensors, staging, metadata={**told, "format": "pt"})
        staging.chmod(0o644)  # safetensors files are born private
        staging.replace(file)
        self.metadata, self.path = told, str(file)
        return file

    @classmethod
    def load(cls, path: str | Path) -> Gates:
        """The gates in the safetensors file ``path``, or in ``gates.safetensors`` of the folder ``path``.

        Raises ValueError naming the file: it is missing, no safetensors file, or holds something else.
        """
        file = file_of(path)
        if not file.is_file():
            raise ValueError(f"gates: there is no file {file}; kvcache train-gates makes one")
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
                metadata = dict(opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"gates: {file} is no safetensors file: {error}") from None
        shapes: dict[int, tuple[int, int]] = {}
        width = 0
        for name, tensor in tensors.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise ValueError(f"gates: {file} holds {name}, which is no part of a gate: these are other weights")
            hidden, heads = shapes.get(int(match[1]), (0, 0))
            if match[3] == "weight" and match[2] == "inner":
                width, hidden = tensor.shape[0], tensor.shape[-1]
            elif match[3] == "weight":
                heads = tensor.shape[0]
            shapes[int(match[1])] = hidden, heads
        if not shapes:
            raise ValueError(f"gates: {file} holds no tensors")
        gates = cls(shapes, width)
        try:
            gates.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"gates: {file} is incomplete: {' '.join(str(error).split())}") from None
        gates.metadata = {k: v for k, v in metadata.items() if k != "format"}
        gates.path = str(file)
        return gates.requires_grad_(False)


def file_of(path: str | Path) -> Path:
    """The file that ``path`` means: itself, or ``gates.safetensors`` in it where it is a folder."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _ranges(numbers: Sequence[int] | Mapping[int, Any]) -> str:
    """Ascending ``numbers`` for people: ``0-3, 7``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, p)) for p in parts)
