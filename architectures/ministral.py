"""Ministral (8B, 2410): Mistral with windows in some layers only, as layer_types says; without it, in all. Ministral 3:
Llama with YaRN, and queries that grow with their position. Mistral 4: these, latent attention, and experts."""

from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like
from .deepseek import latent_like, routed

_WINDOW = 4096  # where config.json says nothing; null: none
_YARN = {  # likewise
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

_YARN_4 = _YARN | {
    "rope_theta": 1e4,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
}
_MISTRAL_4 = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2**20,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "norm_topk_prob": True,
}


def ministral(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    if config.values.get("sliding_window", _WINDOW) is None:
        config.layer_types([FULL] * layers)  # checked, though all see everything
        return llama_like(config)
    window = config.size("sliding_window", _WINDOW)
    types = config.layer_types([SLIDING] * layers)
    return llama_like(config, windows=[window if kind == SLIDING else None for kind in types])


def ministral3(config: Config) -> ModelSpec:
    rope = Config(config.rope_values() or _YARN)
    beta = rope.number("llama_4_scaling_beta", 0.0)
    dim = config.size("head_dim", 128)
    window = config.optional_size("sliding_window")
    layers = config.size("num_hidden_layers")
    return llama_like(
        config,
        windows=[window] * layers,
        ropes=[config.rope(rope.values)] * layers,
        attention={
            "head_dim": dim,
            "scale": dim**-0.5,
            "query_scaling": (beta, rope.size("original_max_position_embeddings"))
            if beta
            else None,
        },
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )


def mistral4(config: Config) -> ModelSpec:
    q_rank = config.optional_size("q_lora_rank", 1024)
    config = config.with_defaults(**_MISTRAL_4)
    mlps = routed(config, width=2048, shared=1, scoring="softmax", correction_bias=False)
    return latent_like(config, q_rank, mlps, rope_values=_YARN_4)
