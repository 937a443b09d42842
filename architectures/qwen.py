"""Qwen 2 and 3: biases on q, k, v (2), norms of query and key heads (3), windows in some layers if asked; with experts,
and in 2 a shared one beside them."""

import operator
from collections.abc import Callable
from typing import Any

from .base import ModelSpec, SharedExpert
from .config import FULL, SLIDING, Config, llama_like
from .experts import experts, in_layers, sparse_layers
from .gguf import (
    HEAD_NORMS,
    ROUTER,
    GgufConfig,
    GgufFamily,
    GgufSource,
    gguf_experts,
    rope_scaling,
    tidy,
)


def qwen2(config: Config) -> ModelSpec:
    return llama_like(config, windows=_windows(config))


def qwen3(config: Config) -> ModelSpec:
    return llama_like(
        config,
        windows=_windows(config),
        attention={
            "qk_norm": "head",
            "head_dim": (dim := config.size("head_dim", 128)),
            "scale": dim**-0.5,
        },
    )


def qwen2_moe(config: Config) -> ModelSpec:
    inner = "shared_expert_intermediate_size"
    found = experts(
        config,
        "moe_intermediate_size",
        count=60,
        top_k=4,
        width=1408,
        norm_weights=config.flag("norm_topk_prob", False),
        shared=SharedExpert(config.size(inner, 5632), gated=True),
    )
    return llama_like(
        config,
        windows=_windows(config, lambda layer, last: layer % 2 == 0 and layer < last),
        mlps=in_layers(config, sparse_layers(config), found, 5632),
    )


def qwen3_moe(config: Config) -> ModelSpec:
    sliding = config.flag("use_sliding_window", False)
    window = config.size("sliding_window", 4096) if sliding else None
    found = experts(
        config,
        "moe_intermediate_size",
        count=128,
        top_k=8,
        width=768,
        norm_weights=config.flag("norm_topk_prob", False),
    )
    return llama_like(
        config,
        windows=[window] * config.size("num_hidden_layers"),
        attention={"qk_norm": "head"},
        mlps=in_layers(config, sparse_layers(config), found, 6144),
    )


def _windows(
    config: Config, has_window: Callable[[int, int], bool] = operator.ge
) -> list[int | None]:
    """Only with use_sliding_window; without layer_types, in the layers for which has_window(layer, max_window_layers):
    from that one on."""
    layers = config.size("num_hidden_layers")
    if not config.flag("use_sliding_window", False):
        return [None] * layers
    window = config.size("sliding_window", 4096)
    last = config.get("max_window_layers", 28)
    types = config.layer_types([SLIDING if has_window(i, last) else FULL for i in range(layers)])
    return [window if kind == SLIDING else None for kind in types]


_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _gguf_config(
    name: str, architecture: str, more: GgufConfig | None = None, model_type: str = ""
) -> GgufConfig:
    """name: of the architecture there; more: of config.json."""

    def config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
        theta = tidy(file.number(f"{name}.rope.freq_base", 10000.0))
        scaling, width = rope_scaling(file, name), f"{name}.attention.key_length"
        return {
            "architectures": [architecture],
            "model_type": model_type or name,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
            **({"rope_scaling": scaling} if scaling else {}),
            **({"head_dim": file.number(width)} if width in file.metadata else {}),
            **({} if more is None else more(file, config)),
        }

    return config


QWEN2_GGUF = GgufFamily(_NORMS, _gguf_config("qwen2", "Qwen2ForCausalLM"))
QWEN3_GGUF = GgufFamily(_NORMS | HEAD_NORMS, _gguf_config("qwen3", "Qwen3ForCausalLM"))
QWEN3_MOE_GGUF = GgufFamily(
    _NORMS | HEAD_NORMS | ROUTER,
    _gguf_config(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        lambda file, config: gguf_experts(file, "qwen3moe") | {"norm_topk_prob": True},
        "qwen3_moe",
    ),
    has_experts=True,
)
