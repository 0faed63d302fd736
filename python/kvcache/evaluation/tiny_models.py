"""A tiny random model of any class of transformers' causal-LM mapping, by shrinking its default configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
LAYERS = 4
WINDOW = 16  # shorter than the prompts of the sweep

_SIZES: list[tuple[int, tuple[str, ...]]] = [
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size")),
    (64, ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "emb_dim", "lru_width", "embedding_size")),
    (96, ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff")),
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_experts",
        "n_routed_experts", "num_local_experts", "moe_num_experts")),
    (2, ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")),
    (16, ("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank",
         "query_pre_attn_scalar", "attention_head_dim", "mamba_d_state", "swa_head_dim",
         "hidden_size_per_layer_input")),
    (8, ("qk_rope_head_dim", "rotary_dim")),
    (32, ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts")),
    (512, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")),
    (WINDOW, ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")),
]  # fmt: skip
SIZES = {name: size for size, names in _SIZES for name in names}
#: Where the generic rule fails: configuration values per model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {}


def shrunk(cls: type[PreTrainedConfig], model_type: str) -> PreTrainedConfig:
    """The default configuration of ``cls`` with every size made small."""
    default = cls()
    text = default.get_text_config(decoder=True)
    values: dict[str, Any] = {}
    known = text.to_dict()
    aliases = getattr(text, "attribute_map", {})
    for name in SIZES:
        value = known.get(aliases.get(name, name), None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            values[aliases.get(name, name)] = min(SIZES[name], value)
    for name, value in known.items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers and name not in values:
            kinds = list(dict.fromkeys(map(str, value)))  # one layer of each kind, then the pattern's beginning
            first = [next(v for v in value if str(v) == kind) for kind in kinds]
            values[name] = (first + value)[:LAYERS] if isinstance(value[0], (str, int)) else value[:LAYERS]
    if "kv_lora_rank" in known:  # MLA: as many key heads as query heads
        values |= {k: 4 for k in ("num_key_value_heads",) if k in values}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
    values |= EXCEPTIONS.get(model_type, {})
    if text is default:
        return cls(**values)
    return type(text)(**values)


def tiny_model(model_cls: type[PreTrainedModel], model_type: str, seed: int = 0) -> PreTrainedModel:
    """A lively random float32 model in eval mode with eager attention; raises whatever the class raises."""
    torch.manual_seed(seed)
    config = shrunk(model_cls.config_class or CONFIG_MAPPING[model_type], model_type)
    size = config.get_text_config(decoder=True).num_hidden_layers
    if size > 12:
        raise ValueError(f"{model_type} could not be shrunk: {size} layers")
    model = model_cls._from_config(config, attn_implementation="eager").float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    enliven(model, seed)
    return model


def enliven(model: PreTrainedModel, seed: int) -> None:
    """Weights for which attention is peaked and decides the next token: small ones repeat one token forever."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "embed" in name or "wte" in name or "wpe" in name:
            p.data = noise * 0.5
        elif p.ndim >= 2:
            gain = 2.0 if any(x in name for x in ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value")) else 1.5
            p.data = noise * gain * p.shape[-1] ** -0.5
        elif "sinks" in name:
            p.data = noise
        elif name.endswith("bias"):
            p.data = noise * 0.1
