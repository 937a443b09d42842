"""LFM2: short convolutions, gated on both sides, and attention with norms of query and key heads; names of its own."""

from dataclasses import replace

from ..errors import CheckpointError
from .base import GatedMlp, ModelSpec, Norms, ShortConv
from .config import FULL, Config, llama_like

CONV = "conv"
_DEFAULTS = {
    "hidden_size": 2560,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "vocab_size": 65536,
    "intermediate_size": 12288,
}
_ATTENTION = {
    "qk_norm": "head",
    "out": "self_attn.out_proj",
    "head_norms": ("self_attn.q_layernorm", "self_attn.k_layernorm"),
}
_NORMS = Norms(before_mixer="operator_norm", before_mlp="ffn_norm")
_MLP = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")


def lfm2(config: Config) -> ModelSpec:
    said = {name: value for name, value in config.values.items() if value is not None}
    config = Config(_DEFAULTS | said)
    layers = range(config.size("num_hidden_layers"))
    attending = config.get("full_attn_idxs", list(layers))
    if not isinstance(attending, list):
        raise CheckpointError("config.json: full_attn_idxs is no list")
    types = config.layer_types([FULL if i in attending else CONV for i in layers], (FULL, CONV))
    model = llama_like(
        config,
        ropes=[config.rope(theta=1e6)] * len(layers),
        attention=_ATTENTION,
        mlps=[GatedMlp(_width(config), "silu", names=_MLP)] * len(layers),
        norms=_NORMS,
        norm_eps=config.epsilon("norm_eps", 1e-5),
        tie_word_embeddings=config.flag("tie_embedding", config.flag("tie_word_embeddings", True)),
        final_norm="embedding_norm",
    )
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
