"""MiniCPM 3: latent attention, with a multiplier each for embeddings, what layers add, and logits."""

import math

from .base import ModelSpec
from .config import Config
from .deepseek import latent_like

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def minicpm3(config: Config) -> ModelSpec:
    hidden, layers = config.size("hidden_size"), config.size("num_hidden_layers")
    q_rank = config.optional_size("q_lora_rank", 768)
    depth = config.optional_positive("scale_depth", 1.4)
    base = config.optional_size("dim_model_base", 256)
    value_dim = max(1, hidden // config.size("num_attention_heads"))
    return latent_like(
        config.with_defaults(**_DEFAULTS, v_head_dim=value_dim),
        q_rank,
        None,
        interleaved=False,
        embedding_scale=config.positive("scale_emb", 12.0),
        residual_scale=1.0 if depth is None else depth / math.sqrt(layers),
        logits_scale=1.0 if base is None else base / hidden,
    )
