"""What config.json says of Mamba-2 layers, in the spellings of the families that have them; Mamba-2 itself, which has
no other layers, and Bamba, which is Llama with it in most layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .base import GatedMlp, LayerSpec, Mamba2, ModelSpec, Norms
from .config import FULL, LINEAR, Config, llama_like

_CONTEXT = 2**15  # of a model that has no other bound than memory
_BAMBA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
_OLD_TYPES = {"mamba": LINEAR, "attention": FULL}  # of before transformers 5


def mamba2(config: Config, *, heads: int, **sizes: Any) -> Mamba2:
    """sizes: other fields of Mamba2, as the file says."""
    mixer = Mamba2(num_heads=heads, time_step_limit=_time_step_limit(config), **sizes)
    if heads % mixer.num_groups:
        raise CheckpointError(
            f"config.json: {mixer.num_groups} groups cannot serve {heads} Mamba heads"
        )
    return mixer


def expanded(config: Config, **more: Any) -> Mamba2:
    """As Bamba and its cousins say it: all heads together are mamba_expand times as wide as the model."""
    heads, width = config.size("mamba_n_heads", 128), config.size("hidden_size")
    width *= config.size("mamba_expand", 2)
    auto = config.get("mamba_d_head", "auto") == "auto"
    head_dim = max(1, width // heads) if auto else config.size("mamba_d_head")
    if heads * head_dim != width:
        raise CheckpointError(
            f"config.json: {heads} Mamba heads of {head_dim} are not the {width} that mamba_expand asks for"
        )
    return mamba2(
        config,
        heads=heads,
        head_dim=head_dim,
        state_dim=config.size("mamba_d_state", 256),
        num_groups=config.size("mamba_n_groups", 1),
        conv_kernel=config.size("mamba_d_conv", 4),
        conv_bias=config.flag("mamba_conv_bias", True),
        **more,
    )


def bamba(config: Config) -> ModelSpec:
    config = config.with_defaults(**_BAMBA)
    layers = config.size("num_hidden_layers")
    attending = config.get("attn_layer_indices", [])
    if not isinstance(attending, list):
        raise CheckpointError("config.json: attn_layer_indices is no list")
    types = [FULL if layer in attending else LINEAR for layer in range(layers)]
    names = tuple(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))
    mlp = GatedMlp(config.size("intermediate_size"), config.activation(), names=names)
    model = llama_like(
        config,
        mlps=[mlp] * layers,
        norms=Norms(before_mlp="pre_ff_layernorm"),
        final_norm="final_layernorm",
    )
    return with_mamba(model, expanded(config), types)


def pure(config: Config) -> ModelSpec:
    """Mamba-2 alone. Nothing bounds its context but what it was trained for, which its files do not say."""
    width, heads = config.size("hidden_size", 4096), config.size("num_heads", 128)
    head_dim = config.size("head_dim", 64)
    if (config.size("expand", 2)) * width != heads * head_dim:
        raise CheckpointError(
            f"config.json: {heads} heads of {head_dim} are not the hidden_size of {width} times expand"
        )
    if (value := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"config.json: hidden_act {value!r} is not supported (silu is)")
    mixer = mamba2(
        config,
        heads=heads,
        head_dim=head_dim,
        state_dim=config.size("state_size", 128),
        num_groups=config.size("n_groups", 8),
        conv_kernel=config.size("conv_kernel", 4),
        conv_bias=config.flag("use_conv_bias", True),
        module="mixer",
    )
    layer = LayerSpec(mixer, None, Norms(before_mixer="norm", before_mlp=None))
    return ModelSpec(
        hidden_size=width,
        vocab_size=config.size("vocab_size", 32768),
        max_position_embeddings=config.size("max_position_embeddings", _CONTEXT),
        norm_eps=config.epsilon("layer_norm_epsilon", 1e-5),
        layers=(layer,) * config.size("num_hidden_layers", 64),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        prefix="backbone.",
        embedding="embeddings",
        final_norm="norm_f",
    )


def with_mamba(model: ModelSpec, mixer: Mamba2, types: Sequence[str]) -> ModelSpec:
    """In the layers of this type."""
    return replace(
        model,
        layers=tuple(
            replace(layer, mixer=mixer) if kind == LINEAR else layer
            for layer, kind in zip(model.layers, types, strict=True)
        ),
    )


def layer_types(config: Config, names: Sequence[str], default: list[str], known: Any) -> list[str]:
    """From the first of these fields that the file has: how many there are is up to the caller."""
    found = next((config.get(name) for name in names if config.get(name) is not None), default)
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"config.json: {names[0]} is {str(found)[:80]!r}, want layer types")
    types = [_OLD_TYPES.get(str(kind), kind) for kind in found]
    for kind in types:
        if kind not in known:
            raise UnsupportedError(
                f"config.json: layer type {kind!r} is not supported ({', '.join(known)} are)"
            )
    return types


def _time_step_limit(config: Config) -> tuple[float, float]:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    found = config.get("time_step_limit", (0.0, math.inf))
    bounds = found if isinstance(found, (list, tuple)) else ()
    low, high = (*map(_bound, bounds), math.nan, math.nan)[:2]
    if len(bounds) != 2 or not 0 <= low < high:
        raise CheckpointError(
            f"config.json: time_step_limit is {str(found)[:80]}, want two numbers, the second larger"
        )
    return low, high


def _bound(value: object) -> float:
    if value == {"__float__": "Infinity"}:
        return math.inf
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return min(float(value), math.inf) if number else math.nan  # type: ignore[arg-type]
