"""Gemma 1, 2 and 3 (text): norms that store w and multiply by 1 + w, scaled embeddings; from 2 on norms after attention
and feed-forward too and windows in some layers; soft caps in 2, norms of query and key heads and a second rope in 3."""

from typing import Any

from .base import SANDWICH, ModelSpec, Rope
from .config import FULL, SLIDING, Config, llama_like
from .gguf import GgufFamily, GgufSource, tidy


def gemma(config: Config) -> ModelSpec:
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    return _like_gemma(config, activation=config.activation(name, "gelu_pytorch_tanh"))


def gemma2(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    types = config.layer_types([FULL if i % 2 else SLIDING for i in range(layers)])
    return _like_gemma(
        config,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        windows=_windows(config, types),
        attention={
            "scale": config.positive("query_pre_attn_scalar", 256) ** -0.5,
            "soft_cap": config.optional_positive("attn_logit_softcapping", 50.0),
        },
        norms=SANDWICH,
        final_soft_cap=config.optional_positive("final_logit_softcapping", 30.0),
    )


def gemma3(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    types = config.layer_types([SLIDING if (i + 1) % every else FULL for i in range(layers)])
    ropes = ropes_by_type(config)
    return _like_gemma(
        config,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        windows=_windows(config, types),
        ropes=[ropes[kind] for kind in types],
        attention={
            "scale": config.positive("query_pre_attn_scalar", 256) ** -0.5,
            "qk_norm": "head",
            "soft_cap": config.optional_positive("attn_logit_softcapping"),
        },
        norms=SANDWICH,
        final_soft_cap=config.optional_positive("final_logit_softcapping"),
    )


def _like_gemma(config: Config, attention: dict[str, Any] | None = None, **more: Any) -> ModelSpec:
    config.refuse("use_bidirectional_attention", "only causal attention is")
    dim = config.size("head_dim", 256)
    return llama_like(
        config,
        attention={"head_dim": dim, "scale": dim**-0.5, **(attention or {})},
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        norm_offset=True,
        embedding_scale=config.size("hidden_size") ** 0.5,
        **more,
    )


def _windows(config: Config, types: list[str]) -> list[int | None]:
    window = config.size("sliding_window", 4096)
    return [window if kind == SLIDING else None for kind in types]


def ropes_by_type(config: Config) -> dict[str, Rope]:
    """By layer type: transformers 5 nests rope_parameters, older files have rope_theta and rope_local_base_freq."""
    parameters = config.get("rope_parameters", {})
    if FULL in parameters:
        return {
            FULL: config.rope(parameters[FULL], 1e6),
            SLIDING: config.rope(parameters.get(SLIDING, {}), 1e4),
        }
    return {
        FULL: config.rope(theta=1e6),
        SLIDING: Rope(config.positive("rope_local_base_freq", 1e4)),
    }


def _gguf_config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
    dim = file.number("gemma3.attention.key_length", 256)
    theta = tidy(file.number("gemma3.rope.freq_base", 1000000.0))
    local_theta = tidy(file.number("gemma3.rope.freq_base_swa", 10000.0))
    factor = file.number("gemma3.rope.scaling.factor", 1.0)
    layers = config["num_hidden_layers"]
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    # Only the 27B model (62 layers) scales queries by hidden_size / heads instead of head_dim.
    query_scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else dim
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar,
        "sliding_window": file.number("gemma3.attention.sliding_window", 1024),
        "sliding_window_pattern": 6,
        "layer_types": [FULL if i % 6 == 5 else SLIDING for i in range(layers)],
        "rope_theta": theta,
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            FULL: {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
            SLIDING: {"rope_theta": local_theta, "rope_type": "default"},
        },
    } | ({"rope_scaling": scaling} if scaling else {})


GEMMA3_GGUF = GgufFamily(
    modules={
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    config=_gguf_config,
    norm_offset=1.0,
)
