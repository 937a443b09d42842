"""OLMo 2 and 3: norms behind attention and feed-forward instead of before them, and over all query and all key heads at
once. OLMo 3 has windows in three layers of four, and a rope scaling (YaRN) in the others alone. OLMoE: experts, and the
norms where Llama has them."""

from collections.abc import Mapping
from typing import Any

from .base import NORMS_AFTER, ModelSpec, Rope
from .config import FULL, SLIDING, Config, llama_like
from .experts import experts
from .gguf import HEAD_NORMS, ROUTER, GgufFamily, GgufSource, gguf_experts, tidy

_THETA = 500000.0  # of OLMo 3


def olmo2(config: Config) -> ModelSpec:
    return llama_like(
        config,
        attention={"qk_norm": "all"},
        norms=NORMS_AFTER,
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )


def olmoe(config: Config) -> ModelSpec:
    config.refuse("clip_qkv", "queries, keys and values are not clipped")
    found = experts(
        config,
        "intermediate_size",
        count=64,
        top_k=8,
        width=2048,
        norm_weights=config.flag("norm_topk_prob", False),
    )
    return llama_like(
        config,
        attention={"qk_norm": "all"},
        mlps=[found] * config.size("num_hidden_layers"),
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )


def _gguf_config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
    theta = tidy(file.number("olmoe.rope.freq_base", 10000.0))
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        **gguf_experts(file, "olmoe"),
    }


OLMOE_GGUF = GgufFamily(
    {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"} | HEAD_NORMS | ROUTER,
    _gguf_config,
    has_experts=True,
)


def olmo3(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    types = config.layer_types([SLIDING if (i + 1) % 4 else FULL for i in range(layers)])
    window, ropes = config.size("sliding_window", 4096), _ropes(config)
    return llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=[ropes[kind] for kind in types],
        attention={"qk_norm": "all"},
        norms=NORMS_AFTER,
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )


def _ropes(config: Config) -> dict[str, Rope]:
    """By layer type: transformers 5 nests rope_parameters, older files have one rope_theta and rope_scaling."""
    found = config.rope_values()
    if any(isinstance(value, Mapping) for value in found.values()):
        return {kind: config.rope(found.get(kind) or {}, _THETA) for kind in (FULL, SLIDING)}
    return {
        FULL: config.rope(theta=_THETA),
        SLIDING: Rope(config.positive("rope_theta", _THETA)),
    }
