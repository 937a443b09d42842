"""ModernBERT: norms first, rotary positions, gated feed-forwards, and two layers of three that see a window alone."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .config import FULL, SLIDING, Config
from .encoder import (
    Classifier,
    EncoderNames,
    EncoderSpec,
    activation,
    num_labels,
    prefix_in,
    score_activation,
)
from .rope import Rope

_NAMES = EncoderNames(
    word="embeddings.tok_embeddings",
    position="",
    token_type="",
    embedding_norm="embeddings.norm",
    layer="layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    up=("mlp.Wi",),
    down="mlp.Wo",
    attention_norm="attn_norm",
    mlp_norm="mlp_norm",
    final_norm="final_norm",
)
_THETA = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}


def spec(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    layers = config.size("num_hidden_layers", 22)
    config = config.with_defaults(num_hidden_layers=layers, hidden_size=768, num_attention_heads=12)
    every = config.size("global_attn_every_n_layers", 3)
    types = config.layer_types([SLIDING if i % every else FULL for i in range(layers)])
    ropes = {kind: _rope(config, kind) for kind in set(types)}
    window = config.size("local_attention", 128) // 2
    found = EncoderSpec(
        hidden_size=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        num_layers=layers,
        num_heads=config.size("num_attention_heads"),
        intermediate_size=config.size("intermediate_size", 1152),
        max_tokens=config.size("max_position_embeddings", 8192),
        norm_eps=config.epsilon("norm_eps", 1e-5),
        activation=activation(config, "hidden_activation"),
        names=_NAMES,
        prefix=prefix_in(names, "model."),
        gated=True,
        norms_first=True,
        position_offset=None,
        ropes=tuple(ropes[kind] for kind in types),
        windows=tuple(window if kind == SLIDING else None for kind in types),
    )
    return replace(found, classifier=_classifier(config)) if head else found


def _rope(config: Config, kind: str) -> Rope:
    """Newer files have parameters for each kind of layer, older ones a theta for each and one scaling."""
    field, theta = _THETA[kind]
    values: Any = config.rope_values()
    if kind in values:
        values = values[kind] or {}
        if not isinstance(values, dict):
            raise CheckpointError("config.json: the rope parameters are no JSON object")
    own = {"rope_theta": config.positive(field, theta)}
    return config.rope({**own, **values})


def _classifier(config: Config) -> Classifier:
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise UnsupportedError(
            f"config.json: classifier_pooling {pooling!r} is not supported (cls and mean are)"
        )
    return Classifier(
        num_labels(config),
        pooling,
        "head.dense",
        activation(config, "classifier_activation"),
        "classifier",
        norm="head.norm",
        score=score_activation(config),
    )
