"""Models by shape, with random weights, built where they will run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

__all__ = ["SHAPES", "Shape", "build", "shape_named"]


@dataclass(frozen=True)
class Shape:
    """An architecture of transformers and the numbers that make its shape. ``dtype`` of weights and cache."""

    name: str
    architecture: str
    sizes: dict[str, Any] = field(hash=False)
    dtype: torch.dtype = torch.bfloat16
    source: str = ""

    def settings(self, positions: int) -> dict[str, Any]:
        """Arguments of the configuration for sequences of up to ``positions`` tokens, as plain values."""
        fixed = {"max_position_embeddings": positions, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
        return {**self.sizes, **fixed}

    def __str__(self) -> str:
        s, family = self.sizes, self.architecture.removesuffix("ForCausalLM")
        heads = s["num_attention_heads"]
        groups = s.get("num_key_value_heads", heads)
        dim = s.get("head_dim", s["hidden_size"] // heads)
        return (
            f"{family}, {s['num_hidden_layers']} layers, hidden {s['hidden_size']}, {heads}/{groups} heads x {dim}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


def _llama(vocab: int, hidden: int, inter: int, layers: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, **more,
    }  # fmt: skip


def _opt(vocab: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "word_embed_proj_dim": hidden,
    }  # fmt: skip


SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        # Small ones, for a CPU and for tests.
        Shape("llama-tiny", "LlamaForCausalLM", _llama(256, 64, 128, 2, 4, 2), torch.float32),
        Shape("qwen3-tiny", "Qwen3ForCausalLM", _llama(256, 64, 128, 2, 4, 2, head_dim=32), torch.float32),
        Shape("opt-tiny", "OPTForCausalLM", _opt(256, 64, 2, 4), torch.float32),
        Shape("llama-27m", "LlamaForCausalLM", _llama(4096, 512, 1408, 8, 8, 2), torch.float32),
        Shape("opt-27m", "OPTForCausalLM", _opt(4096, 512, 8, 8), torch.float32),
        Shape("opt-101m", "OPTForCausalLM", _opt(4096, 512, 32, 8), torch.float32, "OPT-6.7B, an eighth as wide"),
        Shape(
            "qwen3-0.6b", "Qwen3ForCausalLM",
            _llama(151936, 1024, 3072, 28, 16, 8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True),
            torch.float32, "Qwen/Qwen3-0.6B config.json",
        ),
        # For a GPU.
        Shape(
            "qwen3-4b", "Qwen3ForCausalLM",
            _llama(151936, 2560, 9728, 36, 32, 8, head_dim=128, rope_theta=1e6, tie_word_embeddings=True),
            source="Qwen/Qwen3-4B config.json",
        ),
        Shape(
            "llama-3-8b", "LlamaForCausalLM", _llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5),
            source="meta-llama/Meta-Llama-3-8B config.json",
        ),
        Shape("opt-6.7b", "OPTForCausalLM", _opt(50272, 4096, 32, 32), source="facebook/opt-6.7b config.json"),
    )
}  # fmt: skip


def shape_named(name: str) -> Shape:
    """ValueError that lists the known ones for another name."""
    if name not in SHAPES:
        raise ValueError(f"unknown model shape {name!r}; one of {', '.join(SHAPES)}")
    return SHAPES[name]


def build(
    shape: Shape, positions: int, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model of ``shape`` for up to ``positions`` tokens, random weights made on ``device``, with sdpa."""
    torch.manual_seed(seed)
    cls = getattr(transformers, shape.architecture)
    config = cls.config_class(**shape.settings(positions))
    config.eos_token_id = None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or shape.dtype)
    try:
        with torch.device(device):
            config._attn_implementation = "sdpa"
            model = cls(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
