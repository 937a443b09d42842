"""Granite: Llama with a multiplier each for embeddings, attention scores, what layers add, and logits; with experts.
Granite 4: Mamba-2 in most layers. With windows: sinks, and a theta for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .base import ExpertNames, Experts, FeedForward, GatedMlp, ModelSpec, Rope, SharedExpert
from .config import FULL, LINEAR, SLIDING, Config, llama_like
from .experts import experts
from .mamba import expanded, layer_types, with_mamba
from .mistral import MIXTRAL_NAMES

_MOE_NAMES = replace(
    MIXTRAL_NAMES,
    router="block_sparse_moe.router.layer",
    shared="shared_mlp",
    shared_linears=("input_linear", "output_linear"),
    stacked=(
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
    ),
)
# of what transformers 5 writes itself
_SWA_NAMES = ExpertNames(
    gate="block_sparse_moe.experts.*.gate_proj",
    up="block_sparse_moe.experts.*.up_proj",
    down="block_sparse_moe.experts.*.down_proj",
    router="block_sparse_moe.router",
    shared="shared_mlp",
    shared_linears=("input_linear", "output_linear"),
    stacked=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
)
_SWA = {
    "hidden_size": 2560,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}


def moe(config: Config) -> ModelSpec:
    return spec(config, [_experts(config)] * config.size("num_hidden_layers"))


def moe_shared(config: Config) -> ModelSpec:
    """As `moe`, with an MLP beside the experts, if it has a width."""
    return spec(config, [_experts(config, shared=True)] * config.size("num_hidden_layers", 32))


def _experts(config: Config, shared: bool = False, names: ExpertNames | None = None) -> Experts:
    width = config.count("shared_intermediate_size", 0) if shared else 0
    return experts(
        config,
        "intermediate_size",
        count=8,
        top_k=2,
        width=11008,
        norm_weights=True,
        shared=SharedExpert(width) if width else None,
        names=names or _MOE_NAMES,
    )


def hybrid(config: Config) -> ModelSpec:
    """Mamba-2 or attention in each layer, which mostly encodes no positions; experts beside an MLP, or that alone."""
    config = config.with_defaults(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32)
    layers = config.size("num_hidden_layers")
    fields = ("layer_types", "layers_block_type")
    types = layer_types(config, fields, [LINEAR] * layers, (LINEAR, FULL))
    types = Config({**config.values, "layer_types": types}).layer_types([], (LINEAR, FULL))
    turns = config.get("position_embedding_type") == "rope"
    inner = config.size("shared_intermediate_size", 1024)
    names = ("shared_mlp.input_linear", "shared_mlp.output_linear")
    mlp: FeedForward = GatedMlp(inner, config.activation(), names=names)
    if config.count("num_local_experts", 8):
        mlp = replace(_experts(config), shared=SharedExpert(inner))
    model = spec(config, [mlp] * layers, ropes=[config.rope() if turns else None] * layers)
    return with_mamba(model, expanded(config), types) if LINEAR in types else model


def swa(config: Config) -> ModelSpec:
    config = config.with_defaults(**_SWA, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return _windows(config)


def moe_swa(config: Config) -> ModelSpec:
    config = config.with_defaults(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32)
    found = _experts(config, shared=True, names=_SWA_NAMES)
    return _windows(config, [found] * config.size("num_hidden_layers"))


def _windows(config: Config, mlps: Sequence[FeedForward] | None = None) -> ModelSpec:
    layers = config.size("num_hidden_layers")
    types = config.layer_types([SLIDING if i % 4 else FULL for i in range(layers)])
    window = config.size("sliding_window", 128)
    return spec(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=_ropes_by_layer(config, layers),
        attention={"sinks": True},
        mlps=mlps,
    )


def _ropes_by_layer(config: Config, layers: int) -> list[Rope | None]:
    """layer_rope_theta: of each layer, 0 where it encodes no positions."""
    rope = config.rope()
    thetas = config.numbers_by_layer("layer_rope_theta", [rope.theta] * layers)
    return [
        replace(rope, theta=Config({"layer_rope_theta": theta}).positive("layer_rope_theta", 0.0))
        if theta != 0 or isinstance(theta, bool)
        else None
        for theta in thetas
    ]


def spec(
    config: Config,
    mlps: Sequence[FeedForward] | None = None,
    attention: Mapping[str, Any] | None = None,
    **more: Any,
) -> ModelSpec:
    """more: as of llama_like."""
    return llama_like(
        config,
        mlps=mlps,
        attention={"scale": config.positive("attention_multiplier", 1.0), **(attention or {})},
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logits_scale=1 / config.positive("logits_scaling", 1.0),
        **more,
    )
