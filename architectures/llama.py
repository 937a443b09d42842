"""Llama and what is saved as it: SmolLM2, Llama 3 with its rope scaling."""

from typing import Any

import numpy as np

from ..errors import UnsupportedError
from .base import ModelSpec
from .config import Config, llama_like
from .gguf import GgufFamily, GgufSource, rope_scaling, tidy

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec(config: Config) -> ModelSpec:
    return llama_like(config)


def _config(file: GgufSource, config: dict[str, Any]) -> dict[str, Any]:
    dim = file.number(
        "llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    theta = tidy(file.number("llama.rope.freq_base", 10000.0))
    scaling = _rope_scaling(file, dim, theta)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": dim,
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
    } | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(file: GgufSource, dim: int, theta: float) -> dict[str, Any] | None:
    """Llama 3's scaling is a tensor of divisors in a GGUF file, turned back into its four parameters here."""
    scaling = rope_scaling(file, "llama")
    if scaling is not None or "rope_freqs.weight" not in file.tensors:
        return scaling
    stored = file.rows("rope_freqs.weight").reshape(-1).view(np.float32)
    scaling = {"rope_type": "llama3", "factor": tidy(float(stored.max()))} | _LLAMA3
    if len(stored) != dim // 2 or not np.allclose(
        stored, llama3_divisors(scaling, dim, theta), rtol=1e-3
    ):
        raise UnsupportedError(
            f"{file.path}, tensor 'rope_freqs.weight': is not Llama 3's rope scaling"
        )
    return scaling


def llama3_divisors(scaling: dict[str, Any], dim: int, theta: float) -> np.ndarray:
    """What Llama 3's scaling divides each of the dim/2 frequencies by (transformers `rope_type: llama3`)."""
    context = scaling["original_max_position_embeddings"]
    low, high, factor = (
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["factor"],
    )
    wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    divisors: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return divisors


GGUF = GgufFamily(
    modules={"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    config=_config,
    interleaved_heads=True,
)
