"""Granite: Llama with a multiplier each for embeddings, attention scores, what layers add, and logits; with experts."""

from collections.abc import Sequence
from dataclasses import replace

from .base import FeedForward, ModelSpec
from .config import Config, llama_like
from .experts import experts
from .mistral import MIXTRAL_NAMES

_MOE_NAMES = replace(
    MIXTRAL_NAMES,
    router="block_sparse_moe.router.layer",
    stacked=(
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
    ),
)


def moe(config: Config) -> ModelSpec:
    found = experts(
        config,
        "intermediate_size",
        count=8,
        top_k=2,
        width=11008,
        norm_weights=True,
        names=_MOE_NAMES,
    )
    return spec(config, [found] * config.size("num_hidden_layers"))


def spec(config: Config, mlps: Sequence[FeedForward] | None = None) -> ModelSpec:
    return llama_like(
        config,
        mlps=mlps,
        attention={"scale": config.positive("attention_multiplier", 1.0)},
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logits_scale=1 / config.positive("logits_scaling", 1.0),
    )
