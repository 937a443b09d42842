"""GPT-OSS: windows in every other layer, a sink for each head, biases everywhere, experts whose gates are clamped."""

from dataclasses import replace
from typing import Any

from .base import ExpertNames, ModelSpec
from .config import FULL, SLIDING, Config, llama_like
from .experts import experts
from .gguf import GgufFamily, GgufSource, gguf_experts, rope_scaling, tidy

_NAMES = ExpertNames(router="mlp.router", interleaved=True)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    types = config.layer_types([FULL if i % 2 else SLIDING for i in range(layers)])
    window = config.optional_size("sliding_window", 128)
    dim = config.size("head_dim", 64)
    found = experts(
        config,
        "intermediate_size",
        count=128,
        top_k=4,
        width=2880,
        norm_weights=True,
        clamp=(config.positive("swiglu_alpha", 1.702), config.positive("swiglu_limit", 7.0)),
        names=_NAMES,
    )
    dense = llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=[config.rope(config.rope_values() or _YARN, theta=150000.0)] * layers,
        attention={
            "num_kv_heads": config.size("num_key_value_heads", 8),
            "head_dim": dim,
            "scale": dim**-0.5,
            "sinks": True,
        },
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )
    return replace(dense, layers=tuple(replace(layer, mlp=found) for layer in dense.layers))


def _gguf_config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
    theta = tidy(file.number("gpt-oss.rope.freq_base", 150000.0))
    scaling = (rope_scaling(file, "gpt-oss") or _YARN) | {"truncate": False}
    found = gguf_experts(file, "gpt-oss")
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": file.number("gpt-oss.attention.key_length", 64),
        "sliding_window": file.number("gpt-oss.attention.sliding_window", 128),
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta} | scaling,
        "rope_scaling": scaling,
        "num_local_experts": found.pop("num_experts"),
        "num_experts_per_tok": found.pop("num_experts_per_tok"),
        "intermediate_size": found.pop("moe_intermediate_size", config["intermediate_size"]),
    }


GGUF = GgufFamily(
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
    },
    _gguf_config,
    tensors={"attn_sinks.weight": "self_attn.sinks"},
    has_experts=True,
)
