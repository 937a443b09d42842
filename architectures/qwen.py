"""Qwen 2 and 3, dense: biases on q, k, v (2), norms of query and key heads (3), windows in upper layers if asked."""

from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like


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
