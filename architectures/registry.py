"""Architectures by name: config.json -> DecoderConfig. Data, not code; a new cousin of Llama is one short function."""

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedError
from .base import DecoderConfig, RopeConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Raises UnsupportedError for an unknown architecture or a field outside what the decoder does."""
    names = config.get("architectures") or [config.get("model_type", "")]
    for name in names:
        if name in ARCHITECTURES:
            try:
                return ARCHITECTURES[name](config)
            except KeyError as error:
                raise UnsupportedError(
                    f"config.json: the field {error} of {name} is missing"
                ) from None
    raise UnsupportedError(
        f"config.json: architecture {', '.join(map(str, names))} is not supported; "
        f"Nibble serves {', '.join(sorted(ARCHITECTURES))}"
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and scaling as one dict, from transformers 5's rope_parameters or the older two fields."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = dict(config.get("rope_scaling") or {})
    return {"rope_theta": config.get("rope_theta", 10000.0), **parameters}


def _rope_config(parameters: dict[str, Any]) -> RopeConfig:
    rest = {
        k: v for k, v in parameters.items() if k != "rope_theta" and not isinstance(v, (list, dict))
    }
    return RopeConfig(float(parameters["rope_theta"]), tuple(sorted(rest.items())))


def _common(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
    }


def _activation(config: dict[str, Any], key: str = "hidden_act", default: str = "silu") -> str:
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    value = config.get(key) or default
    if value not in names:
        raise UnsupportedError(
            f"config.json: {key} {value!r} is not supported ({', '.join(names)} are)"
        )
    return names[value]


def _layer_types(config: dict[str, Any], default: str) -> tuple[str, ...]:
    return tuple(config.get("layer_types") or [default] * config["num_hidden_layers"])


def _llama(config: dict[str, Any], *, window: bool = False, qk_norm: bool = False) -> DecoderConfig:
    rope = _rope_config(_rope(config))
    sliding = (
        config.get("sliding_window") if window and config.get("use_sliding_window", True) else None
    )
    types = _layer_types(config, _SLIDING if sliding else _FULL)
    if not sliding:
        types = (_FULL,) * len(types)
    return DecoderConfig(
        **_common(config),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        rope=dict.fromkeys(types, rope),
        layer_types=types,
        sliding_window=sliding,
        activation=_activation(config),
        qk_norm=qk_norm,
    )


def _gemma3(config: dict[str, Any]) -> DecoderConfig:
    if config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        raise UnsupportedError("config.json: logit soft-capping is not supported for Gemma 3")
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    layers = range(config["num_hidden_layers"])
    types = tuple(
        config.get("layer_types") or [_FULL if (i + 1) % every == 0 else _SLIDING for i in layers]
    )
    parameters = config.get("rope_parameters") or {}
    if _FULL in parameters:
        rope = {
            kind: _rope_config({"rope_theta": 1e6 if kind == _FULL else 1e4, **parameters[kind]})
            for kind in (_FULL, _SLIDING)
        }
    else:
        rope = {
            _FULL: _rope_config({**_rope(config), "rope_theta": config.get("rope_theta", 1e6)}),
            _SLIDING: RopeConfig(float(config.get("rope_local_base_freq", 1e4))),
        }
    common = _common(config)
    return DecoderConfig(
        **{**common, "head_dim": config.get("head_dim", 256)},
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        rope={kind: rope[kind] for kind in set(types)},
        layer_types=types,
        sliding_window=config.get("sliding_window", 4096),
        activation=_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=True,
        qk_norm=True,
        sandwich_norms=True,
        embedding_scale=config["hidden_size"] ** 0.5,
        norm_names=("input_layernorm", "pre_feedforward_layernorm"),
    )


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": lambda config: _llama(config, window=True),
    "Qwen2ForCausalLM": lambda config: _llama({"use_sliding_window": False, **config}, window=True),
    "Qwen3ForCausalLM": lambda config: _llama(
        {"use_sliding_window": False, **config}, window=True, qk_norm=True
    ),
    "Gemma3ForCausalLM": _gemma3,
}
