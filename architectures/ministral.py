"""Ministral (8B, 2410): Mistral with windows in some layers only, as layer_types says; without it, in all."""

from .base import ModelSpec
from .config import FULL, SLIDING, Config, llama_like

_WINDOW = 4096  # where config.json says nothing; null: none


def spec(config: Config) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    if config.values.get("sliding_window", _WINDOW) is None:
        config.layer_types([FULL] * layers)  # checked, though all see everything
        return llama_like(config)
    window = config.size("sliding_window", _WINDOW)
    types = config.layer_types([SLIDING] * layers)
    return llama_like(config, windows=[window if kind == SLIDING else None for kind in types])
