"""Qwen 3.5, 3.6 and 3.8, dense: in three layers of four a gated delta rule, in the fourth attention whose output is
gated, with norms of query and key heads of which a quarter turns. Norms store w and multiply by 1 + w."""

from dataclasses import replace

from ..errors import CheckpointError
from .base import GatedDeltaNet, ModelSpec
from .config import FULL, LINEAR, Config, llama_like

_DEFAULTS = {
    "hidden_size": 4096,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
}


def qwen3_5(config: Config) -> ModelSpec:
    """The text model. Its rope's sections are those of images: of text, all three positions are the same."""
    config = Config(_DEFAULTS | {k: v for k, v in config.values.items() if v is not None})
    every = config.size("full_attention_interval", 4)
    layers = range(config.size("num_hidden_layers"))
    types = config.layer_types(
        [LINEAR if (i + 1) % every else FULL for i in layers], (FULL, LINEAR)
    )
    model = llama_like(
        config,
        attention={"qk_norm": "head", "output_gate": True},
        norm_offset=True,
    )
    delta = gated_delta_net(config)
    return replace(
        model,
        layers=tuple(
            replace(layer, mixer=delta) if kind == LINEAR else layer
            for layer, kind in zip(model.layers, types, strict=True)
        ),
    )


def gated_delta_net(config: Config) -> GatedDeltaNet:
    """The linear_* fields, with Qwen's defaults."""
    mixer = GatedDeltaNet(
        num_key_heads=config.size("linear_num_key_heads", 16),
        num_value_heads=config.size("linear_num_value_heads", 32),
        key_dim=config.size("linear_key_head_dim", 128),
        value_dim=config.size("linear_value_head_dim", 128),
        conv_kernel=config.size("linear_conv_kernel_dim", 4),
    )
    if mixer.num_value_heads % mixer.num_key_heads:
        raise CheckpointError(
            f"config.json: {mixer.num_key_heads} linear key heads cannot serve {mixer.num_value_heads} value heads"
        )
    return mixer
