"""Ministral (8B, 2410): Mistral with windows in some layers only, as layer_types says; without it, in all. Ministral 3:
Llama with YaRN, and queries that grow with their position."""

from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like

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
