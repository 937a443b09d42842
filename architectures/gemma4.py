"""Gemma 4 (text): windows in five layers of six, with heads and a rotation of their own; norms of queries, keys
and values; a scalar a layer. The small ones (E2B, E4B) tell every layer of the token once more, and their upper layers
read the keys and values of the last layer of their kind below. 26B-A4B has experts beside each MLP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .base import (
    SANDWICH,
    Attention,
    ExpertNames,
    Experts,
    GatedMlp,
    LayerSpec,
    MlpBesideExperts,
    ModelSpec,
    PerLayerInputs,
    Rope,
)
from .config import FULL, SLIDING, Config, llama_like

_EXPERTS = ExpertNames(
    "experts.*.gate_proj",
    "experts.*.up_proj",
    "experts.*.down_proj",
    "router.proj",
    stacked=("experts.gate_up_proj", "experts.down_proj"),
)
_ROPES: dict[str, dict[str, Any]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def spec(config: Config) -> ModelSpec:
    if config.get("use_bidirectional_attention") == "all":
        raise UnsupportedError("config.json: use_bidirectional_attention 'all' is not supported")
    layers, types = config.size("num_hidden_layers"), _types(config)
    activation = config.activation("hidden_activation", "gelu_pytorch_tanh")
    dense = llama_like(config, attention={"head_dim": 256, "scale": 1.0}, activation=activation)
    first_reader = layers - config.count("num_kv_shared_layers", 0)
    wide = 2 if config.flag("use_double_wide_mlp", False) else 1
    inner, experts = config.size("intermediate_size"), _experts(config, activation)

    def layer(index: int) -> LayerSpec:
        source = kv_source(types, index, first_reader)
        mlp = GatedMlp(inner * (1 if source is None else wide), activation)
        mixer = _attention(config, types, index, source)
        if experts is None:
            return LayerSpec(mixer, mlp, SANDWICH, scalar=True)
        norms = replace(SANDWICH, before_mlp=None)
        return LayerSpec(mixer, MlpBesideExperts(mlp, experts), norms, scalar=True)

    return replace(
        dense,
        layers=tuple(layer(index) for index in range(layers)),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        embedding_scale=config.size("hidden_size") ** 0.5,
        final_soft_cap=config.optional_positive("final_logit_softcapping"),
        per_layer_inputs=_per_layer_inputs(config, activation),
    )


def unified(config: Config) -> ModelSpec:
    """The text of Gemma 4 12B: no inputs for every layer, a wider window."""
    said = config.with_defaults(sliding_window=1024)
    return spec(Config({**said.values, "hidden_size_per_layer_input": 0}))


def _types(config: Config) -> list[str]:
    """The last layer sees everything, whatever the file says, as in transformers."""
    layers = config.size("num_hidden_layers")
    types = config.layer_types([SLIDING if (i + 1) % 6 else FULL for i in range(layers)])
    return [*types[:-1], FULL]


def kv_source(types: list[str], index: int, first_reader: int) -> int | None:
    """The layer whose keys and values a layer reads; None: its own."""
    if index < first_reader:
        return None
    below = [i for i in range(first_reader) if types[i] == types[index]]
    if not below:
        raise CheckpointError(
            f"config.json: num_kv_shared_layers leaves no {types[index]} layer to share keys and values with"
        )
    return below[-1]


def _attention(config: Config, types: list[str], index: int, source: int | None) -> Attention:
    full = types[index] == FULL
    heads, own = config.size("num_attention_heads"), _own_sizes(config, index, full)
    kv_heads, dim = own.size("num_key_value_heads", 4), own.size("head_dim", 256)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads"
        )
    ropes = config.rope_values() or _ROPES
    return Attention(
        heads,
        kv_heads,
        dim,
        scale=1.0,
        rope=_rope(config, ropes.get(types[index])),
        window=None if full else config.size("sliding_window", 512),
        qk_norm="head",
        v_norm=True,
        keys_are_values=full and source is None and config.flag("attention_k_eq_v", False),
        kv_source=source,
    )


def _own_sizes(config: Config, index: int, full: bool) -> Config:
    """num_key_value_heads and head_dim of a layer: transformers 5 lists them by layer, Google by kind."""
    sizes = {name: config.get(name) for name in ("num_key_value_heads", "head_dim")}
    listed = config.get("per_layer_config")
    if isinstance(listed, Mapping):
        own = listed.get(str(index), {})
        return Config(sizes | (dict(own) if isinstance(own, Mapping) else {}))
    if full:
        sizes["head_dim"] = config.get("global_head_dim", 512)
        if config.flag("attention_k_eq_v", False) and config.get("num_global_key_value_heads"):
            sizes["num_key_value_heads"] = config.get("num_global_key_value_heads")
    return Config(sizes)


def _rope(config: Config, parameters: Any) -> Rope:
    return config.rope(parameters if isinstance(parameters, Mapping) else {})


def _experts(config: Config, activation: Any) -> Experts | None:
    if not config.flag("enable_moe_block", False):
        return None
    count, chosen = config.size("num_experts"), config.size("top_k_experts")
    if chosen > count:
        raise CheckpointError(f"config.json: top_k_experts is {chosen}, of {count} experts")
    return Experts(
        count,
        chosen,
        config.size("moe_intermediate_size"),
        activation,
        norm_weights=True,
        names=_EXPERTS,
    )


def _per_layer_inputs(config: Config, activation: Any) -> PerLayerInputs | None:
    width = config.count("hidden_size_per_layer_input", 256)
    if not width:
        return None
    vocab_size = config.size("vocab_size_per_layer_input", 262144)
    if vocab_size < config.size("vocab_size"):
        raise CheckpointError(
            f"config.json: vocab_size_per_layer_input {vocab_size} is less than vocab_size: some tokens have no inputs"
        )
    return PerLayerInputs(width, vocab_size, activation)
