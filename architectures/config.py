"""config.json, read with one clear error for what is missing, of another type or outside what Nibble computes.

Names and defaults are those of transformers' configuration classes, older spellings included.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .base import (
    FUSED,
    Attention,
    FeedForward,
    GatedMlp,
    LayerSpec,
    LongFactors,
    ModelSpec,
    Norms,
    Rope,
)
from .limits import MAX_SIZE, SIZES

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
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
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": (),  # what each frequency is divided by, within the context before scaling and beyond
    "proportional": (),  # the share of a head that turns, as if all of it did
}
_YARN_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0}  # what it may have, and else has


class Config:
    """The fields of config.json, by type. Every error names the field, what it is and what it should be."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        """The value; the default also where the file says null."""
        value = self.values.get(name)
        return default if value is None else value

    def with_defaults(self, **defaults: Any) -> "Config":
        """The same file, with these where it says null or nothing."""
        said = {name: value for name, value in self.values.items() if value is not None}
        return Config(defaults | said)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer, within its bound in limits.py."""
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(
                f"config.json: {name} is missing", fix="take config.json from the original model"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name} is {value!r}, want a positive integer")
        if value > (limit := SIZES.get(name, MAX_SIZE)):
            raise CheckpointError(
                f"config.json: {name} is more than {limit}, the most that is read"
            )
        return value

    def count(self, name: str, default: int) -> int:
        """A size that may be 0."""
        value = self.get(name, default)
        return 0 if value == 0 and not isinstance(value, bool) else self.size(name, default)

    def optional_size(self, name: str, default: int | None = None) -> int | None:
        """None where the file says null; the default where it says nothing."""
        if name not in self.values:
            return default
        return None if self.get(name) is None else self.size(name)

    def number(self, name: str, default: float) -> float:
        """A finite number: JSON readers take infinity and NaN."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"config.json: {name} is {value!r}, want a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise CheckpointError(f"config.json: {name} is no finite number")
        return number

    def positive(self, name: str, default: float) -> float:
        """A number above zero."""
        number = self.number(name, default)
        if number <= 0:
            raise CheckpointError(f"config.json: {name} is {number!r}, want a positive number")
        return number

    def epsilon(self, name: str, default: float) -> float:
        """What a norm adds before it takes the root: above 0 and below 1."""
        value = self.positive(name, default)
        if value >= 1:
            raise CheckpointError(f"config.json: {name} is {value:g}, want less than 1")
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name, 0.0)

    def optional_positive(self, name: str, default: float | None = None) -> float | None:
        """None where the file says null; the default where it says nothing."""
        if name not in self.values:
            return default
        return None if self.get(name) is None else self.positive(name, 0.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {value!r}, want true or false")
        return value

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Any:
        """One of GatedMlp's."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedError(
                f"config.json: {name} {value!r} is not supported ({', '.join(ACTIVATIONS)} are)"
            )
        return ACTIVATIONS[value]

    def refuse(self, name: str, why: str) -> None:
        """Raise UnsupportedError where this field is set."""
        if value := self.get(name):
            raise UnsupportedError(f"config.json: {name} {value!r} is not supported ({why})")

    def layer_types(
        self, default: list[str], known: tuple[str, ...] = (FULL, SLIDING)
    ) -> list[str]:
        """One of `known` a layer; `default` where the file has none."""
        found = self.get("layer_types", default)
        if not isinstance(found, list) or len(found) != self.size("num_hidden_layers"):
            raise CheckpointError(
                f"config.json: layer_types has {len(found) if isinstance(found, list) else 'no'} "
                f"entries for {self.size('num_hidden_layers')} layers"
            )
        for value in found:
            if value not in known:
                raise UnsupportedError(
                    f"config.json: layer type {value!r} is not supported ({', '.join(known)} are)"
                )
        return found

    def numbers_by_layer(self, name: str, default: list[Any]) -> list[Any]:
        """A list with as many entries as there are layers, which are still to be looked at."""
        found, layers = self.get(name, default), self.size("num_hidden_layers")
        if not isinstance(found, list) or len(found) != layers:
            raise CheckpointError(f"config.json: {name} is no list of {layers} numbers")
        return found

    def rope_values(self) -> Mapping[str, Any]:
        """transformers 5's rope_parameters, else rope_scaling."""
        found = self.get("rope_parameters")
        if found is None:
            found = self.get("rope_scaling", {})
        if not isinstance(found, Mapping):
            raise CheckpointError("config.json: the rope parameters are no JSON object")
        return found

    def rope(self, parameters: Mapping[str, Any] | None = None, theta: float = 10000.0) -> Rope:
        """From the parameters given, else from rope_values and rope_theta."""
        found = self.rope_values() if parameters is None else parameters
        if not isinstance(found, Mapping):
            raise CheckpointError("config.json: the rope parameters are no JSON object")
        scaling = found.get("rope_type") or found.get("type") or "default"
        if not isinstance(scaling, str) or scaling not in ROPE_PARAMETERS:
            raise UnsupportedError(
                f"config.json: rope scaling {scaling!r} is not supported ({', '.join(ROPE_PARAMETERS)} are)"
            )
        # as transformers: the length before scaling is the file's own where the parameters have none
        context = self.get("max_position_embeddings")
        values = Config({"original_max_position_embeddings": context} | dict(found))
        needed = ROPE_PARAMETERS[scaling]
        if missing := [name for name in needed if values.get(name) is None]:
            raise CheckpointError(f"config.json: {scaling} rope scaling needs {missing[0]}")
        settings = {name: values.positive(name, 0.0) for name in needed}
        factor, long = 1.0, None
        if scaling == "proportional":
            settings["share"] = values.positive("partial_rotary_factor", 1.0)
            settings["factor"] = values.positive("factor", 1.0)
        if scaling == "longrope":
            settings, factor, long = self._longrope(Config(found))
        if scaling == "yarn":
            settings |= {name: values.positive(name, d) for name, d in _YARN_OPTIONAL.items()}
            settings["truncate"] = float(values.flag("truncate", True))
            factor = _yarn_attention_factor(values)
        return Rope(
            values.positive("rope_theta", self.positive("rope_theta", theta)),
            scaling,
            tuple(settings.items()),
            dim=None if scaling == "proportional" else self._rotary_dim(values),
            attention_factor=factor,
            long=long,
        )

    def _longrope(self, parameters: "Config") -> tuple[dict[str, float], float, LongFactors | None]:
        """What each frequency is divided by, in order, the attention factor (Ding et al. 2024), and what those of
        longer requests are divided by. As in transformers, the file's own length before scaling goes before that of
        the parameters."""
        name = "original_max_position_embeddings"
        context = self.size("max_position_embeddings")
        length = self.size(name, parameters.size(name, context))
        factor = parameters.positive("factor", context / length)
        if length == 1 and factor > 1:
            raise CheckpointError(f"config.json: {name} is 1, want more than that")
        sharpness = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
        short = self._factors(parameters, "short_factor")
        long = None
        if context > length:
            long = LongFactors(length, self._factors(parameters, "long_factor"))
        return (
            {str(i): each for i, each in enumerate(short)},
            parameters.positive("attention_factor", sharpness),
            long,
        )

    def _factors(self, parameters: "Config", name: str) -> tuple[float, ...]:
        """A positive number for each frequency."""
        found = parameters.get(name)
        half = (self._rotary_dim(parameters) or head_dim(self)) // 2
        if not isinstance(found, list) or len(found) != half:
            raise CheckpointError(
                f"config.json: longrope rope scaling needs {name}, a list of {half} numbers"
            )
        factors = Config({f"{name}[{i}]": each for i, each in enumerate(found)})
        return tuple(factors.positive(each, 0.0) for each in factors.values)

    def _rotary_dim(self, parameters: "Config") -> int | None:
        """How much of each head turns; None: all of it."""
        name = "partial_rotary_factor"
        share = parameters.number(name, self.number(name, 1.0))
        if share == 1.0:
            return None
        dim = int(head_dim(self) * share)
        if not 0 < share < 1 or dim < 2 or dim % 2:
            raise CheckpointError(
                f"config.json: {name} is {share:g}, want a share that turns an even number of a "
                f"head's {head_dim(self)} dimensions"
            )
        return dim


def _yarn_attention_factor(values: Config) -> float:
    """What YaRN multiplies cosines and sines by (Peng et al. 2023, equation 22; `mscale` is DeepSeek's)."""
    given = values.optional_number("attention_factor")
    if given is not None:
        return given
    factor = values.number("factor", 1.0)
    one, all_dims = values.optional_number("mscale"), values.optional_number("mscale_all_dim")
    if one and all_dims:
        return yarn_sharpness(factor, one) / yarn_sharpness(factor, all_dims)
    return yarn_sharpness(factor, 1.0)


def yarn_sharpness(factor: float, strength: float) -> float:
    """How much sharper attention must be over a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def eos_token_ids(values: Mapping[str, Any], file: Path) -> list[int]:
    """`eos_token_id` of config.json or generation_config.json, which is one id, several or none. `file`: for errors."""
    found = values.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for token_id in ids:
        if (
            isinstance(token_id, bool)
            or not isinstance(token_id, int)
            or not 0 <= token_id <= MAX_SIZE
        ):
            raise CheckpointError(
                f"eos_token_id is {str(found)[:80]!r}, want token ids",
                file=file,
                fix="take config.json and generation_config.json from the original model",
            )
    return ids


def head_dim(config: Config) -> int:
    heads = config.size("num_attention_heads")
    return config.size("head_dim", max(1, config.size("hidden_size") // heads))


def llama_like(
    config: Config,
    *,
    windows: list[int | None] | None = None,
    ropes: Sequence[Rope | None] | None = None,
    attention: Mapping[str, Any] | None = None,
    activation: Any = None,
    mlps: Sequence[FeedForward] | None = None,
    fused: bool = False,
    norms: Norms | None = None,
    **model: Any,
) -> ModelSpec:
    """A decoder of Llama's shape; what a cousin does otherwise is given.

    windows, ropes, mlps: one a layer. attention: fields of Attention. fused: q, k, v and gate, up are stored as one.
    model: fields of ModelSpec.
    """
    layers, dim, heads = (
        config.size("num_hidden_layers"),
        head_dim(config),
        config.size("num_attention_heads"),
    )
    windows = [None] * layers if windows is None else windows
    ropes = [config.rope()] * layers if ropes is None else ropes
    if mlps is None:
        inner = config.size("intermediate_size")
        mlp = GatedMlp(inner, activation or config.activation())
        mlps = [replace(mlp, names=FUSED) if fused else mlp] * layers
    mixer = {
        "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", heads),
        "head_dim": dim,
        "scale": dim**-0.5,
        "fused": fused,
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
        layers=tuple(
            LayerSpec(Attention(**mixer, rope=rope, window=window), mlp, norms or Norms())
            for rope, window, mlp in zip(ropes, windows, mlps, strict=True)
        ),
        **{
            "norm_eps": config.epsilon("rms_norm_eps", 1e-6),
            "tie_word_embeddings": config.flag("tie_word_embeddings", False),
            **model,
        },
    )
