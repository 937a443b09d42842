"""Granite, dense: Llama with a multiplier each for embeddings, attention scores, what layers add, and logits."""

from .base import ModelSpec
from .config import Config, llama_like


def spec(config: Config) -> ModelSpec:
    return llama_like(
        config,
        attention={"scale": config.positive("attention_multiplier", 1.0)},
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logits_scale=1 / config.positive("logits_scaling", 1.0),
    )
