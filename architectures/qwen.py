"""Qwen 2 and 3, dense: biases on q, k, v (2), norms of query and key heads (3), windows in upper layers if asked."""

from typing import Any

from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like
from .gguf import GgufConfig, GgufFamily, GgufSource, rope_scaling, tidy


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


def _windows(config: Config) -> list[int | None]:
    """Only with use_sliding_window; without layer_types, the layers from max_window_layers on have it."""
    layers = config.size("num_hidden_layers")
    if not config.flag("use_sliding_window", False):
        return [None] * layers
    window = config.size("sliding_window", 4096)
    first = config.get("max_window_layers", 28)
    types = config.layer_types([SLIDING if i >= first else FULL for i in range(layers)])
    return [window if kind == SLIDING else None for kind in types]


_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _gguf_config(name: str, architecture: str) -> GgufConfig:
    def config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
        theta = tidy(file.number(f"{name}.rope.freq_base", 10000.0))
        scaling, width = rope_scaling(file, name), f"{name}.attention.key_length"
        return {
            "architectures": [architecture],
            "model_type": name,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
            **({"rope_scaling": scaling} if scaling else {}),
            **({"head_dim": file.number(width)} if width in file.metadata else {}),
        }

    return config


QWEN2_GGUF = GgufFamily(_NORMS, _gguf_config("qwen2", "Qwen2ForCausalLM"))
QWEN3_GGUF = GgufFamily(
    _NORMS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    _gguf_config("qwen3", "Qwen3ForCausalLM"),
)
