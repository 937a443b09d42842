"""Mistral: Llama with a sliding window in every layer. Mixtral: with experts, and a window if asked."""

from .base import ExpertNames, ModelSpec
from .config import Config, llama_like
from .experts import experts

_WINDOW = 4096  # where config.json says nothing; null: none


def spec(config: Config) -> ModelSpec:
    null = config.values.get("sliding_window", _WINDOW) is None
    window = None if null else config.size("sliding_window", _WINDOW)
    return llama_like(config, windows=[window] * config.size("num_hidden_layers"))


MIXTRAL_NAMES = ExpertNames(
    gate="block_sparse_moe.experts.*.w1",
    up="block_sparse_moe.experts.*.w3",
    down="block_sparse_moe.experts.*.w2",
    router="block_sparse_moe.gate",
)


def mixtral(config: Config) -> ModelSpec:
    layers, window = config.size("num_hidden_layers"), config.optional_size("sliding_window")
    found = experts(
        config,
        "intermediate_size",
        count=8,
        top_k=2,
        width=14336,
        norm_weights=True,
        names=MIXTRAL_NAMES,
    )
    return llama_like(
        config,
        windows=[window] * layers,
        ropes=[config.rope(theta=1e6)] * layers,
        mlps=[found] * layers,
        norm_eps=config.epsilon("rms_norm_eps", 1e-5),
    )
