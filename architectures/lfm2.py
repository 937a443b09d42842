"""LFM2: short convolutions, gated on both sides, and attention with norms of query and key heads; names of its own. Its
mixtures have experts in all layers but the first ones. LFM3: windows in some layers, a gate for each head, norms behind
mixers and feed-forwards too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from .base import ExpertNames, FeedForward, GatedMlp, ModelSpec, Norms, Rope, ShortConv
from .config import FULL, SLIDING, Config, llama_like
from .experts import experts

CONV = "conv"
_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "vocab_size": 65536,
}
_ATTENTION = {
    "qk_norm": "head",
    "out": "self_attn.out_proj",
    "head_norms": ("self_attn.q_layernorm", "self_attn.k_layernorm"),
}
_NORMS = Norms(before_mixer="operator_norm", before_mlp="ffn_norm")
_MLP = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")


_EXPERTS = ExpertNames(
    gate="feed_forward.experts.*.w1",
    up="feed_forward.experts.*.w3",
    down="feed_forward.experts.*.w2",
    router="feed_forward.gate",
    correction_bias="feed_forward.expert_bias",
    stacked=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
)


def lfm2(config: Config) -> ModelSpec:
    config = _with(config, hidden_size=2560, intermediate_size=12288)
    mlp = GatedMlp(_width(config), "silu", names=_MLP)
    return _hybrid(config, [mlp] * config.size("num_hidden_layers"))


def lfm2_moe(config: Config) -> ModelSpec:
    config = _with(config, hidden_size=2048, intermediate_size=7168)
    config = _with(config, num_experts=32, num_experts_per_tok=4, num_dense_layers=2)
    found = experts(
        config,
        "moe_intermediate_size",
        count=None,
        top_k=None,
        width=1792,
        scoring="sigmoid",
        norm_weights=config.flag("norm_topk_prob", True),
        routed_scale=config.positive("routed_scaling_factor", 1.0),
        correction_bias=config.flag("use_expert_bias", True),
        names=_EXPERTS,
    )
    layers, dense = config.size("num_hidden_layers"), config.values["num_dense_layers"]
    if isinstance(dense, bool) or not isinstance(dense, int) or not 0 <= dense <= layers:
        raise CheckpointError(f"config.json: num_dense_layers is {dense!r}, of {layers} layers")
    mlp = GatedMlp(config.size("intermediate_size"), "silu", names=_MLP)
    return _hybrid(config, [mlp] * dense + [found] * (layers - dense))


_LFM3 = {
    "hidden_size": 2048,
    "intermediate_size": 7680,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "conv_L_cache": 7,
}
_LFM3_ROPES: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def lfm3(config: Config) -> ModelSpec:
    config = config.with_defaults(**_LFM3)
    layers = config.size("num_hidden_layers")
    default = [FULL if i % 4 == 2 else SLIDING if i and i % 4 == 0 else CONV for i in range(layers)]
    types = config.layer_types(default, (FULL, SLIDING, CONV))
    norms = _NORMS
    if config.flag("use_sandwich_norm", True):
        norms = replace(norms, after_mixer="post_operator_norm", after_mlp="post_ffn_norm")
    window, ropes = config.size("sliding_window", 256), _ropes(config)
    model = llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=[ropes.get(kind) for kind in types],
        attention={"qk_norm": "head", "head_gate": config.flag("use_attention_gate", True)},
        mlps=[GatedMlp(config.size("intermediate_size"), "silu", names=_MLP)] * layers,
        norms=norms,
        norm_eps=config.epsilon("norm_eps", 1e-5),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        final_norm="embedding_norm",
    )
    return _with_convs(config, model, types)


def _ropes(config: Config) -> dict[str, Rope]:
    """By layer type."""
    found = config.rope_values() or _LFM3_ROPES
    return {kind: config.rope(found.get(kind) or _LFM3_ROPES[kind]) for kind in _LFM3_ROPES}


def _with(config: Config, **defaults: int) -> Config:
    said = {name: value for name, value in config.values.items() if value is not None}
    return Config(_DEFAULTS | defaults | said)


def _hybrid(config: Config, mlps: Sequence[FeedForward]) -> ModelSpec:
    layers = range(config.size("num_hidden_layers"))
    attending = config.get("full_attn_idxs", list(layers))
    if not isinstance(attending, list):
        raise CheckpointError("config.json: full_attn_idxs is no list")
    types = config.layer_types([FULL if i in attending else CONV for i in layers], (FULL, CONV))
    model = llama_like(
        config,
        ropes=[config.rope(theta=1e6)] * len(layers),
        attention=_ATTENTION,
        mlps=mlps,
        norms=_NORMS,
        norm_eps=config.epsilon("norm_eps", 1e-5),
        tie_word_embeddings=config.flag("tie_embedding", config.flag("tie_word_embeddings", True)),
        final_norm="embedding_norm",
    )
    return _with_convs(config, model, types)


def _with_convs(config: Config, model: ModelSpec, types: Sequence[str]) -> ModelSpec:
    conv = ShortConv(
        config.size("hidden_size"), config.size("conv_L_cache", 3), config.flag("conv_bias", False)
    )
    return replace(
        model,
        layers=tuple(
            replace(layer, mixer=conv) if kind == CONV else layer
            for layer, kind in zip(model.layers, types, strict=True)
        ),
    )


def _width(config: Config) -> int:
    """Of the feed-forward: two thirds of what the file says, made a multiple, unless that is switched off."""
    width = config.size("block_ff_dim", config.size("intermediate_size"))
    if config.flag("block_auto_adjust_ff_dim", True):
        factor = config.optional_positive("block_ffn_dim_multiplier", 1.0)
        multiple = config.size("block_multiple_of", 256)
        width = int((factor or 1.0) * int(2 * width / 3))
        width = -(-width // multiple) * multiple
    return Config({"intermediate_size": width}).size("intermediate_size")
