"""Rotary position embedding by the model's own frequencies, so that cached keys can be moved to other positions.

Rotations add up, Rot(a) Rot(b) = Rot(a + b), so a key stored at one position can be turned to any other. The factor
that some variants (YaRN, LongRoPE) multiply into cosine and sine is part of the stored key already and not applied
again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


class Rotation:
    """Rotates keys and queries of a model by given positions.

    Built from the model's rotary module (``inv_freq``) and checked against the model's own ``apply_rotary_pos_emb``
    before use; raises ValueError saying what whoever wants to rotate "needs" or "does not know".
    """

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        name = type(model).__name__
        if not modules:
            raise ValueError(f"needs rotary embeddings with inv_freq, which {name} does not have")
        rotary = modules[0]
        kind = getattr(rotary, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"needs fixed rotary frequencies; {name} uses rope_type={kind!r}, "
                "whose frequencies depend on the length"
            )
        if any(not torch.equal(m.inv_freq, rotary.inv_freq) for m in modules[1:]):
            raise ValueError(f"needs one set of rotary frequencies; {name} has several")
        self.inv_freq = rotary.inv_freq.detach().float()
        self._check(model, rotary)

    def rotate(self, x: Tensor, positions: Tensor, sign: float = 1.0) -> Tensor:
        """x [R, H, T, D] turned by ``positions`` [R, T], or by head [R, H, T]; the first 2 * len(inv_freq) channels,
        halves paired."""
        return self.turn(x, *self.angles(positions, sign))

    def angles(self, positions: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotation to ``positions`` [R, T], [R, 1, T, half] each, or to those of each head,
        [R, H, T]; ``sign`` -1: back."""
        by_head = positions if positions.ndim == 3 else positions[:, None]
        angle = by_head.to(torch.float32)[..., None] * self.inv_freq.to(positions.device)
        return angle.cos(), angle.sin() * sign

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [R, H, T, D] turned by what :meth:`angles` gave."""
        half = cos.shape[-1]
        a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`; padding (position -1) is turned too, harmlessly."""
        return self.rotate(x, positions, -1.0)

    def _check(self, model: nn.Module, rotary: Any) -> None:
        """Compare with the model's own function: the pairing of channels differs between models."""
        apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
        name = type(model).__name__
        if apply is None:
            raise ValueError(f"needs apply_rotary_pos_emb to check the rotation against, which {name} does not have")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 3, 2 * self.inv_freq.numel(), generator=generator).to(self.inv_freq.device)
        positions = torch.tensor([[0, 7, 1000]], device=x.device)
        try:
            cos, sin = rotary(x, positions)
            theirs = apply(x, x, cos, sin)[1] / getattr(rotary, "attention_scaling", 1.0)
        except Exception as error:
            raise ValueError(f"does not know the rotary embedding of {name}: {error}") from error
        if theirs.shape != x.shape or not torch.allclose(self.rotate(x, positions), theirs, atol=1e-4):
            raise ValueError(f"does not know how {name} pairs the channels of its rotary embedding")
