"""BERT and its nearest: RoBERTa and XLM-RoBERTa, which number positions from 2 on; MPNet, whose heads weigh distances
too and which has no token types; DistilBERT, under names of its own."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedError
from .config import Config
from .encoder import (
    Classifier,
    EncoderNames,
    EncoderSpec,
    activation,
    last_row,
    num_labels,
    prefix_in,
    score_activation,
)

_BUCKETS = 32  # of MPNet's distances, whatever config.json says: so transformers computes them

_BERT = EncoderNames(
    word="embeddings.word_embeddings",
    position="embeddings.position_embeddings",
    token_type="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
)
_MPNET = replace(
    _BERT,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    relative="encoder.relative_attention_bias",
)
_DISTILBERT = replace(
    _BERT,
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
    attention_norm="sa_layer_norm",
    mlp_norm="output_layer_norm",
)


def bert(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    _check(config)
    prefix = prefix_in(names, "bert.")
    spec = _like_bert(config, _BERT, prefix)
    if not head:
        return spec
    pooler = f"{prefix}pooler.dense"
    return replace(spec, classifier=_classifier(config, pooler, "classifier"))


def roberta(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    """Positions begin behind the row of the padding token."""
    _check(config)
    offset = config.count("pad_token_id", 1) + 1
    spec = _like_bert(config, _BERT, prefix_in(names, "roberta."), offset=offset)
    return replace(spec, classifier=_roberta_head(config)) if head else spec


def mpnet(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    buckets = config.size("relative_attention_num_buckets", _BUCKETS)
    if buckets != _BUCKETS:
        raise UnsupportedError(
            f"config.json: relative_attention_num_buckets {buckets} is not supported ({_BUCKETS} is)"
        )
    spec = _like_bert(config, _MPNET, prefix_in(names, "mpnet."), offset=2, token_types=0)
    return replace(
        spec, relative_buckets=buckets, classifier=_roberta_head(config) if head else None
    )


def distilbert(config: Config, names: Collection[str], head: bool) -> EncoderSpec:
    own = {
        "hidden_size": config.get("dim"),
        "num_hidden_layers": config.get("n_layers"),
        "num_attention_heads": config.get("n_heads"),
        "intermediate_size": config.get("hidden_dim"),
        "hidden_act": config.get("activation"),
    }
    config = Config({**config.values, **own})
    spec = _like_bert(config, _DISTILBERT, prefix_in(names, "distilbert."), token_types=0)
    if not head:
        return spec
    return replace(spec, classifier=_classifier(config, "pre_classifier", "classifier", "relu"))


def _check(config: Config) -> None:
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UnsupportedError(
            f"config.json: position_embedding_type {kind!r} is not supported ('absolute' is)"
        )
    config.refuse("is_decoder", "an encoder sees all of a text")


def _like_bert(
    config: Config,
    names: EncoderNames,
    prefix: str,
    *,
    offset: int = 0,
    token_types: int | None = None,
) -> EncoderSpec:
    types = config.count("type_vocab_size", 2) if token_types is None else token_types
    return EncoderSpec(
        hidden_size=config.size("hidden_size", 768),
        vocab_size=config.size("vocab_size"),
        num_layers=config.size("num_hidden_layers", 12),
        num_heads=config.size("num_attention_heads", 12),
        intermediate_size=config.size("intermediate_size", 3072),
        max_tokens=last_row(config, offset),
        norm_eps=config.epsilon("layer_norm_eps", 1e-12),
        activation=activation(config),
        names=names,
        prefix=prefix,
        position_offset=offset,
        token_types=types,
    )


def _classifier(config: Config, dense: str, out: str, activation: Any = "tanh") -> Classifier:
    return Classifier(
        num_labels(config), "cls", dense, activation, out, score=score_activation(config)
    )


def _roberta_head(config: Config) -> Classifier:
    return _classifier(config, "classifier.dense", "classifier.out_proj")
