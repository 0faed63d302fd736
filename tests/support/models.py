"""Tiny random models of many architectures, whose greedy output does not fall into a loop at once."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from kvcache.evaluation import tiny_models

transformers.logging.set_verbosity_error()

VOCABULARY = 97
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
BASE = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GQA = {**BASE, "num_key_value_heads": 2}
GQA16 = {**GQA, "head_dim": 16}
WINDOW = 16  # sliding window of the models that have one: shorter than the prompts of the tests

ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-gqa": (LlamaConfig, GQA),
    "llama-mqa": (LlamaConfig, {**BASE, "num_key_value_heads": 1}),
    "llama-mha": (LlamaConfig, {**BASE, "num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, GQA),
    "qwen3": (Qwen3Config, GQA16),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {**GQA16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mistral": (MistralConfig, {**GQA, "sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, {**GQA16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        Gemma3TextConfig,
        {
            **GQA16,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt-oss": (
        GptOssConfig,
        {**GQA16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        OPTConfig,
        {
            **{k: v for k, v in BASE.items() if k != "intermediate_size"},
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
        },
    ),
    "gpt2": (
        GPT2Config,
        {**SPECIAL, "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    ),
    "gpt-neox": (GPTNeoXConfig, BASE),
    "phi3": (Phi3Config, GQA),
    "deepseek-v3": (
        DeepseekV3Config,
        {
            **BASE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(name: str = "qwen3", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in float32, made lively; ``changes`` go into its configuration."""
    cls, values = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = cls(**{**values, **changes})
    # sdpa of transformers 5.17 leaves the softcap out; eager attention is the truth in all versions.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if capped else {}
    model = AutoModelForCausalLM.from_config(config, **options).float().eval()
    enliven(model, seed)
    return model


def enliven(model: PreTrainedModel, seed: int = 0) -> None:
    tiny_models.enliven(model, seed, width=BASE["hidden_size"])


def prompt(length: int = 40, seed: int = 1, rows: int = 1) -> Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [length] of different lengths as one batch (ids, attention_mask), padded with 0 on ``side``."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        part = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[r, part], mask[r, part] = row, 1
    return ids, mask


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = 24, **kwargs: Any) -> Any:
    """``generate`` without sampling; the result has ``sequences`` and ``past_key_values``."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **kwargs
    )


def continued(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = 24, **kwargs: Any) -> Tensor:
    """The new tokens alone, [rows, new]."""
    return greedy(model, ids, mask, new, **kwargs).sequences[:, ids.shape[1] :]
