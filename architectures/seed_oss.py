"""Seed-OSS: Llama with heads of 128 whatever the width, and biases on q, k and v, which are read where the checkpoint
has them."""

from .base import ModelSpec
from .config import Config, llama_like


def spec(config: Config) -> ModelSpec:
    dim = config.size("head_dim", 128)
    return llama_like(config, attention={"head_dim": dim, "scale": dim**-0.5})
