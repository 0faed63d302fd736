"""A tiny random model of any class of transformers' causal-LM mapping, by shrinking its default configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
LAYERS = 4
WINDOW = 24  # shorter than the prompts of the sweep, longer than its budget: eviction shows on sliding layers too

_SIZES: list[tuple[int, tuple[str, ...]]] = [
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "unpadded_vocab_size")),
    (64, ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "emb_dim", "lru_width", "embedding_size",
        "decoder_hidden_size")),
    (96, ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
        "dim_ff")),
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "swa_num_attention_heads")),
    (2, ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token",
         "num_kv_shared_layers", "swa_num_key_value_heads", "num_dense_layers")),
    (16, ("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank",
         "query_pre_attn_scalar", "attention_head_dim", "mamba_d_state", "swa_head_dim",
         "hidden_size_per_layer_input")),
    (8, ("qk_rope_head_dim", "rotary_dim")),
    (32, ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts")),
    (512, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")),
    (WINDOW, ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size",
        "sliding_window_size")),
]  # fmt: skip
SIZES = {name: size for size, names in _SIZES for name in names}
#: Sizes for what a default configuration leaves open although its model reads it.
OPEN = {
    "head_dim": 16,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
#: Where the generic rule fails: configuration values per model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_state": 16},
    "cohere_compass": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_state": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "blenderbot": {"encoder_layers": LAYERS},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4": {"global_head_dim": 16},
    "gemma4_unified": {"global_head_dim": 16},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},  # times the cycles
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def small_values(default: PreTrainedConfig, model_type: str) -> dict[str, Any]:
    """Arguments for a small configuration of the type of ``default``."""
    values: dict[str, Any] = {}
    known = default.to_dict()
    aliases = getattr(default, "attribute_map", {})
    for name, size in SIZES.items():
        value = known.get(aliases.get(name, name), None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            values[aliases.get(name, name)] = min(size, value)
        elif value is None and name in OPEN and name in known:
            values[name] = OPEN[name]
    depth = getattr(default, "num_hidden_layers", None)
    for name, value in known.items():
        if isinstance(value, list) and len(value) == depth and name not in values:
            kinds = list(dict.fromkeys(map(str, value)))  # one layer of each kind, then the pattern's beginning
            first = [next(v for v in value if str(v) == kind) for kind in kinds]
            values[name] = (first + value)[:LAYERS] if isinstance(value[0], (str, int)) else value[:LAYERS]
    if known.get("kv_lora_rank"):  # MLA: as many key heads as query heads; the rotary part has the head_dim of RoPE
        values |= {k: v for k, v in (("num_key_value_heads", 4), ("head_dim", 8)) if k in values}
    if "is_decoder" in known:
        values["is_decoder"] = True
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
    return values | EXCEPTIONS.get(model_type, {})


def shallow(part: PreTrainedConfig) -> dict[str, Any]:
    """A vision or audio tower that is built and never run: two layers of each stack."""
    known = part.to_dict()
    depths = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_blocks", "conf_num_hidden_layers")
    return known | {k: min(known[k], 2) for k in depths if isinstance(known.get(k), int)}


def shrunk(cls: type[PreTrainedConfig], model_type: str) -> PreTrainedConfig:
    """The default configuration of ``cls`` with every size made small."""
    default = cls()
    text = default.get_text_config(decoder=True)
    parts = {k: v for k, v in vars(default).items() if isinstance(v, PreTrainedConfig)}
    values = {k: shallow(v) for k, v in parts.items()}
    # Older encoder-decoders answer with a copy of themselves.
    key = next((k for k, v in parts.items() if v is text), None)
    if key is None:
        return cls(**(values | small_values(default, model_type)))
    small = type(text)(**small_values(text, model_type))
    special = {"pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}
    special = {k: v for k, v in special.items() if hasattr(default, k)}
    return cls(**(values | special | {key: small}))


def tiny_model(model_cls: type[PreTrainedModel], model_type: str, seed: int = 0, gain: float = 1.0) -> PreTrainedModel:
    """A lively random float32 model in eval mode with eager attention; raises whatever the class raises."""
    torch.manual_seed(seed)
    config = shrunk(model_cls.config_class or CONFIG_MAPPING[model_type], model_type)
    size = getattr(config.get_text_config(decoder=True), "num_hidden_layers", LAYERS)
    if size > 12:
        raise ValueError(f"{model_type} could not be shrunk: {size} layers")
    model = model_cls._from_config(config, attn_implementation="eager").float().eval()
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, name, None)
    model.generation_config.pad_token_id = 0
    enliven(model, seed, gain)
    return model


def enliven(model: PreTrainedModel, seed: int, strength: float = 1.0, width: int | None = None) -> None:
    """Weights for which attention is peaked and decides the next token: small ones repeat one token forever.

    Every head gets weights of its own, so that a wrong map from query to kv heads shows. ``width``: the inputs that all
    matrices are scaled for; None: each for its own.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "embed" in name or "wte" in name or "wpe" in name:
            p.data = noise * (0.5 * strength if "position" in name or "wpe" in name else 0.5)
        elif p.ndim >= 2:
            gain = 2.0 if any(x in name for x in ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value")) else 1.5
            p.data = noise * gain * strength * (width or p.shape[-1]) ** -0.5
        elif "sinks" in name:
            p.data = noise
        elif name.endswith("bias"):
            p.data = noise * 0.1
