"""Gemma 3n (text): Gemma 4's small layers in four streams of hidden states, with a short way around attention and gates
of which only the largest count in the lower layers."""

from dataclasses import replace

from ..errors import CheckpointError, UnsupportedError
from .base import SANDWICH, AltUp, Attention, GatedMlp, Laurel, LayerSpec, ModelSpec, PerLayerInputs
from .config import FULL, SLIDING, Config, llama_like
from .gemma import ropes_by_type
from .gemma4 import kv_source

_SPARSE_LAYERS, _SPARSITY = 10, 0.95  # where a file of more layers says nothing


def spec(config: Config) -> ModelSpec:
    config = config.with_defaults(
        num_key_value_heads=2, head_dim=256, max_position_embeddings=32768
    )
    layers = config.size("num_hidden_layers")
    activation = config.activation("hidden_activation", "gelu_pytorch_tanh")
    types = config.layer_types([SLIDING if (i + 1) % 5 else FULL for i in range(layers)])
    first_reader = layers - config.count("num_kv_shared_layers", 15)
    window, ropes = config.size("sliding_window", 512), ropes_by_type(config)
    dense = llama_like(
        config,
        windows=[window if kind == SLIDING else None for kind in types],
        ropes=[ropes[kind] for kind in types],
        attention={"scale": 1.0, "qk_norm": "head", "v_norm": True},
        mlps=[
            GatedMlp(size, activation, sparsity)
            for size, sparsity in zip(_sizes(config), _sparsities(config), strict=True)
        ],
        norms=SANDWICH,
    )
    laurel = Laurel(config.size("laurel_rank", 64))

    def layer(index: int, made: LayerSpec) -> LayerSpec:
        if not isinstance(made.mixer, Attention):
            raise TypeError("llama_like gives layers that attend")
        mixer = replace(made.mixer, kv_source=kv_source(types, index, first_reader))
        return replace(made, mixer=mixer, laurel=laurel)

    return replace(
        dense,
        layers=tuple(layer(index, made) for index, made in enumerate(dense.layers)),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        embedding_scale=config.size("hidden_size") ** 0.5,
        final_soft_cap=config.optional_positive("final_logit_softcapping", 30.0),
        per_layer_inputs=PerLayerInputs(
            config.size("hidden_size_per_layer_input", 256),
            config.size("vocab_size_per_layer_input", 262144),
            activation,
        ),
        alt_up=_alt_up(config),
    )


def _alt_up(config: Config) -> AltUp:
    streams, active = config.size("altup_num_inputs", 4), config.count("altup_active_idx", 0)
    if active >= streams:
        raise CheckpointError(f"config.json: altup_active_idx is {active}, of {streams} streams")
    if streams == 1:
        raise UnsupportedError("config.json: altup_num_inputs 1 is not supported; it is at least 2")
    return AltUp(streams, active, config.flag("altup_correct_scale", True))


def _sizes(config: Config) -> list[int]:
    """Intermediate sizes: one of all layers, or a list."""
    name = "intermediate_size"
    if not isinstance(config.get(name), list):
        return [config.size(name, 16384)] * config.size("num_hidden_layers")
    return [Config({name: each}).size(name) for each in config.numbers_by_layer(name, [])]


def _sparsities(config: Config) -> list[float]:
    """Of gates: one of all layers, or a list."""
    name, layers = "activation_sparsity_pattern", config.size("num_hidden_layers")
    if isinstance(config.get(name), (int, float)):
        found = [config.get(name)] * layers
    else:
        sparse = _SPARSE_LAYERS if layers > _SPARSE_LAYERS else 0
        found = config.numbers_by_layer(name, [_SPARSITY] * sparse + [0.0] * (layers - sparse))
    shares = [Config({name: each}).number(name, 0.0) for each in found]
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise CheckpointError(
            f"config.json: {name} has {wrong[0]:g}, want shares from 0 to below 1"
        )
    return shares
