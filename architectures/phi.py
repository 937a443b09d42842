"""Phi 3 and 4: Llama whose q, k, v and gate, up are stored as one matrix each; Phi 4 mini turns a part of each head."""

from .base import ModelSpec
from .config import Config, llama_like


def phi3(config: Config) -> ModelSpec:
    window = config.optional_size("sliding_window")
    return llama_like(
        config,
        windows=[window] * config.size("num_hidden_layers"),
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
        fused=True,
    )
