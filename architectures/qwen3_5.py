"""Qwen 3.5, 3.6 and 3.8, dense and with experts, and Qwen3-Next: a gated delta rule in three layers of four, in the
fourth attention whose output is gated, with norms of query and key heads of which a quarter turns. Norms store w and
multiply by 1 + w."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from .base import Experts, FeedForward, GatedDeltaNet, ModelSpec, SharedExpert
from .config import FULL, LINEAR, Config, llama_like
from .experts import experts, in_layers, sparse_layers
from .gguf import (
    HEAD_NORMS,
    ROUTER,
    SHARED_EXPERT,
    GgufConfig,
    GgufFamily,
    GgufSource,
    gguf_experts,
    tidy,
)

_DEFAULTS = {"head_dim": 256, "max_position_embeddings": 32768, "partial_rotary_factor": 0.25}


def qwen3_5(config: Config) -> ModelSpec:
    """The text model. Its rope's sections are those of images: of text, all three positions are the same."""
    return _hybrid(_with(config, hidden_size=4096, num_key_value_heads=4))


def qwen3_5_moe(config: Config) -> ModelSpec:
    """Experts in every layer."""
    config = _with(config, hidden_size=2048, num_key_value_heads=2, num_experts=256)
    config = _with(config, num_experts_per_tok=8, intermediate_size=1)  # there is no dense MLP
    return _hybrid(config, in_layers(config, lambda layer: True, _experts(config, True), 1))


def qwen3_next(config: Config) -> ModelSpec:
    """As 3.5 with experts, with the linears of a layer's input stored head by head in one."""
    config = _with(config, hidden_size=2048, num_key_value_heads=2, num_experts=512)
    config = _with(config, num_experts_per_tok=10, intermediate_size=5632)
    found = _experts(config, config.flag("norm_topk_prob", True))
    return _hybrid(config, in_layers(config, sparse_layers(config), found, 5632), fused=True)


def _with(config: Config, **defaults: int) -> Config:
    return config.with_defaults(**_DEFAULTS | defaults)


def _experts(config: Config, norm_weights: bool) -> Experts:
    shared = SharedExpert(config.size("shared_expert_intermediate_size", 512), gated=True)
    return experts(
        config,
        "moe_intermediate_size",
        count=None,
        top_k=None,
        width=512,
        norm_weights=norm_weights,
        shared=shared,
    )


def _hybrid(
    config: Config, mlps: Sequence[FeedForward] | None = None, fused: bool = False
) -> ModelSpec:
    every = config.size("full_attention_interval", 4)
    layers = range(config.size("num_hidden_layers"))
    types = config.layer_types(
        [LINEAR if (i + 1) % every else FULL for i in layers], (FULL, LINEAR)
    )
    model = llama_like(
        config,
        attention={"qk_norm": "head", "output_gate": "q_proj"},
        mlps=mlps,
        norm_offset=True,
    )
    delta = _gated_delta_net(config, fused)
    return replace(
        model,
        layers=tuple(
            replace(layer, mixer=delta) if kind == LINEAR else layer
            for layer, kind in zip(model.layers, types, strict=True)
        ),
    )


def _gated_delta_net(config: Config, fused: bool) -> GatedDeltaNet:
    """The linear_* fields, with Qwen's defaults."""
    mixer = GatedDeltaNet(
        num_key_heads=config.size("linear_num_key_heads", 16),
        num_value_heads=config.size("linear_num_value_heads", 32),
        key_dim=config.size("linear_key_head_dim", 128),
        value_dim=config.size("linear_value_head_dim", 128),
        conv_kernel=config.size("linear_conv_kernel_dim", 4),
        fused=fused,
    )
    if mixer.num_value_heads % mixer.num_key_heads:
        raise CheckpointError(
            f"config.json: {mixer.num_key_heads} linear key heads cannot serve {mixer.num_value_heads} value heads"
        )
    return mixer


def _gguf_config(name: str, architecture: str, model_type: str) -> GgufConfig:
    """name: of the architecture there."""

    def config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
        head_dim = file.number(f"{name}.attention.key_length")
        value_heads = file.number(f"{name}.ssm.time_step_rank")
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "head_dim": head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": tidy(file.number(f"{name}.rope.freq_base", 10000.0)),
                "partial_rotary_factor": file.number(f"{name}.rope.dimension_count") / head_dim,
            },
            "full_attention_interval": file.number(f"{name}.full_attention_interval", 4),
            "linear_num_key_heads": file.number(f"{name}.ssm.group_count"),
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": file.number(f"{name}.ssm.state_size"),
            "linear_value_head_dim": file.number(f"{name}.ssm.inner_size") // value_heads,
            "linear_conv_kernel_dim": file.number(f"{name}.ssm.conv_kernel"),
            **_gguf_shared_experts(file, name),
        } | _gguf_layer_types(file, name, config["num_hidden_layers"])

    return config


def _gguf_shared_experts(file: GgufSource, name: str) -> dict[str, Any]:
    if f"{name}.expert_count" not in file.metadata:
        return {}
    width = file.number(f"{name}.expert_shared_feed_forward_length")
    return gguf_experts(file, name) | {"shared_expert_intermediate_size": width}


def _gguf_layer_types(file: GgufSource, name: str, layers: int) -> dict[str, Any]:
    """Where the file says it layer by layer."""
    recurrent = file.metadata.get(f"{name}.attention.recurrent_layers")
    if not isinstance(recurrent, list):
        return {}
    return {"layer_types": [LINEAR if each else FULL for each in recurrent[:layers]]}


_GGUF_MODULES = HEAD_NORMS | {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_GGUF_TENSORS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
QWEN3_5_GGUF = GgufFamily(
    _GGUF_MODULES,
    _gguf_config("qwen35", "Qwen3_5ForCausalLM", "qwen3_5_text"),
    _GGUF_TENSORS,
    value_heads=True,
    norm_offset=1.0,
)
QWEN3_5_MOE_GGUF = GgufFamily(
    _GGUF_MODULES | ROUTER | SHARED_EXPERT,
    _gguf_config("qwen35moe", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    _GGUF_TENSORS,
    has_experts=True,
    value_heads=True,
    norm_offset=1.0,
)
