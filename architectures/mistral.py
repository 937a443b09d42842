"""Mistral: Llama with a sliding window in every layer."""

from .base import ModelSpec
from .config import Config, llama_like

_WINDOW = 4096  # where config.json says nothing; null: none


def spec(config: Config) -> ModelSpec:
    null = config.values.get("sliding_window", _WINDOW) is None
    window = None if null else config.size("sliding_window", _WINDOW)
    return llama_like(config, windows=[window] * config.size("num_hidden_layers"))
