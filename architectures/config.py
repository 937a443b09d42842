"""config.json, read with one clear error for what is missing, of another type or outside what Nibble computes.

Names and defaults are those of transformers' configuration classes, older spellings included.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .base import Attention, GatedMlp, LayerSpec, ModelSpec, Norms, Rope

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ROPE_PARAMETERS = {  # scaling -> what it needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


LARGEST = 1 << 31
MOST = {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "vocab_size": 1 << 24}  # what is absurd


class Config:
    """The fields of config.json, by type. Every error names the field, what it is and what it should be."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The value; the default also where the file says null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(
                f"config.json: {name} is missing", fix="take config.json from the original model"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name} is {value!r}, want a positive integer")
        if value > (most := MOST.get(name, LARGEST)):
            raise CheckpointError(f"config.json: {name} is {value:.6g}, want at most {most}")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number, as all of them are: no infinity, which JSON readers take."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"config.json: {name} is {value!r}, want a number")
        if not 0 < value < LARGEST**2:
            raise CheckpointError(f"config.json: {name} is {value:.6g}, want a positive number")
        return float(value)

    def epsilon(self, name: str, default: float) -> float:
        """What a norm adds before it takes the root: above 0 and below 1."""
        value = self.number(name, default)
        if value >= 1:
            raise CheckpointError(f"config.json: {name} is {value:g}, want less than 1")
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name, 0.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {value!r}, want true or false")
        return value

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Any:
        """One of GatedMlp's."""
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise UnsupportedError(
                f"config.json: {name} {value!r} is not supported ({', '.join(ACTIVATIONS)} are)"
            )
        return ACTIVATIONS[value]

    def refuse(self, name: str, why: str) -> None:
        """Raise UnsupportedError where this field is set."""
        if value := self.get(name):
            raise UnsupportedError(f"config.json: {name} {value!r} is not supported ({why})")

    def layer_types(self, default: list[str]) -> list[str]:
        """FULL or SLIDING, one a layer; `default` where the file has none."""
        found = self.get("layer_types", default)
        if not isinstance(found, list) or len(found) != self.size("num_hidden_layers"):
            raise CheckpointError(
                f"config.json: layer_types has {len(found) if isinstance(found, list) else 'no'} "
                f"entries for {self.size('num_hidden_layers')} layers"
            )
        for value in found:
            if value not in (FULL, SLIDING):
                raise UnsupportedError(
                    f"config.json: layer type {value!r} is not supported ({FULL}, {SLIDING} are)"
                )
        return found

    def rope(self, parameters: Mapping[str, Any] | None = None, theta: float = 10000.0) -> Rope:
        """From transformers 5's rope_parameters (or the part of it given), else from rope_theta and rope_scaling."""
        found = parameters if parameters is not None else self.get("rope_parameters")
        if found is None:
            found = self.get("rope_scaling", {})
        if not isinstance(found, Mapping):
            raise CheckpointError("config.json: the rope parameters are no JSON object")
        scaling = found.get("rope_type") or found.get("type") or "default"
        if scaling not in ROPE_PARAMETERS:
            raise UnsupportedError(
                f"config.json: rope scaling {scaling!r} is not supported ({', '.join(ROPE_PARAMETERS)} are)"
            )
        values = Config(found)
        needed = ROPE_PARAMETERS[scaling]
        if missing := [name for name in needed if values.get(name) is None]:
            raise CheckpointError(f"config.json: {scaling} rope scaling needs {missing[0]}")
        return Rope(
            values.number("rope_theta", self.number("rope_theta", theta)),
            scaling,
            tuple((name, values.number(name, 0.0)) for name in needed),
        )


def head_dim(config: Config) -> int:
    heads = config.size("num_attention_heads")
    return config.size("head_dim", max(1, config.size("hidden_size") // heads))


def llama_like(
    config: Config,
    *,
    windows: list[int | None] | None = None,
    ropes: list[Rope] | None = None,
    attention: Mapping[str, Any] | None = None,
    activation: Any = None,
    norms: Norms | None = None,
    **model: Any,
) -> ModelSpec:
    """A decoder of Llama's shape; what a cousin does otherwise is given.

    windows, ropes: one a layer. attention: fields of Attention. model: fields of ModelSpec.
    """
    layers, dim, heads = (
        config.size("num_hidden_layers"),
        head_dim(config),
        config.size("num_attention_heads"),
    )
    windows = [None] * layers if windows is None else windows
    ropes = [config.rope()] * layers if ropes is None else ropes
    mlp = GatedMlp(config.size("intermediate_size"), activation or config.activation())
    mixer = {
        "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads),
        "head_dim": dim,
        "scale": dim**-0.5,
        **(attention or {}),
    }
    if heads % mixer["num_kv_heads"]:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot share {mixer['num_kv_heads']} key-value heads"
        )
    return ModelSpec(
        hidden_size=config.size("hidden_size"),
        vocab_size=config.size("vocab_size"),
        max_position_embeddings=config.size("max_position_embeddings", 2048),
        norm_eps=config.epsilon("rms_norm_eps", 1e-6),
        layers=tuple(
            LayerSpec(Attention(**mixer, rope=rope, window=window), mlp, norms or Norms())
            for rope, window in zip(ropes, windows, strict=True)
        ),
        **{"tie_word_embeddings": config.flag("tie_word_embeddings", False), **model},
    )
