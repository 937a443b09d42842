"""A GGUF model in Hugging Face terms: tensor names and config.json, for the architectures llama and gemma3.

What differs from the HF checkpoint that a GGUF was made from (llama.cpp `convert_hf_to_gguf.py`):
  llama   rows of q and k are interleaved for llama.cpp's RoPE (undone by `hf_row_order`); Llama 3's rope scaling is a
          tensor `rope_freqs.weight` of divisors (turned back into its four parameters)
  gemma3  norms are stored as 1 + w (HF keeps w)
"""

import math
import re
from typing import Any

import numpy as np

from ....errors import CheckpointError, UnsupportedError
from .container import GgufFile

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LINEAR = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}  # fmt: skip
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def architecture(file: GgufFile) -> str:
    arch = file.metadata.get("general.architecture")
    if arch not in _NORMS:
        raise UnsupportedError(
            f"{file.path}: GGUF architecture {arch!r} is not supported (llama and gemma3 are)"
        )
    if file.metadata.get(f"{arch}.expert_count"):
        raise UnsupportedError(f"{file.path}: mixture-of-experts GGUF files are not supported")
    return arch


def tensor_names(file: GgufFile) -> dict[str, str]:
    """HF tensor name -> GGUF tensor name. Raises CheckpointError for a tensor that has no place in the model."""
    arch = architecture(file)
    inner = _LINEAR | _NORMS[arch]
    names: dict[str, str] = {}
    for gguf_name in file.tensors:
        if gguf_name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
        block, stem, suffix = match.groups() if match else (None, "", "")
        hf_stem = _TOP.get(stem) if block is None else inner.get(stem)
        if hf_stem is None:
            raise CheckpointError(f"is no part of a {arch} model", file=file.path, tensor=gguf_name)
        prefix = "" if block is None else f"model.layers.{block}."
        names[f"{prefix}{hf_stem}.{suffix}"] = gguf_name
    return names


def hf_row_order(file: GgufFile, gguf_name: str) -> np.ndarray | None:
    """Row index [rows] that puts a llama q or k tensor in HF's order; None where GGUF keeps HF's order."""
    heads_key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(gguf_name.split(".")[-2])
    if file.metadata["general.architecture"] != "llama" or heads_key is None:
        return None
    heads = file.number(f"llama.attention.{heads_key}", file.number("llama.attention.head_count"))
    rows = file.tensors[gguf_name].shape[0]
    if rows % (2 * heads):
        raise CheckpointError(
            f"has {rows} rows, which are not {heads} heads", file=file.path, tensor=gguf_name
        )
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def norm_offset(file: GgufFile, gguf_name: str) -> float:
    """What to subtract from a stored norm weight to get HF's."""
    return 1.0 if file.metadata["general.architecture"] == "gemma3" and "norm" in gguf_name else 0.0


def synthesize_config(file: GgufFile) -> dict[str, Any]:
    """config.json as transformers would have written it for the model in the file."""
    arch = architecture(file)
    meta = file.metadata
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(
            "is missing", file=file.path, tensor="token_embd.weight", fix="download it again"
        )
    heads = file.number(f"{arch}.attention.head_count")
    config = {
        "hidden_size": file.number(f"{arch}.embedding_length"),
        "intermediate_size": file.number(f"{arch}.feed_forward_length"),
        "num_hidden_layers": file.number(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number(f"{arch}.attention.head_count_kv", heads),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": file.number(f"{arch}.context_length"),
        "rms_norm_eps": _tidy(file.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(file),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
        "use_cache": True,
    }
    return config | (_llama(file, config) if arch == "llama" else _gemma3(file, config))


def eos_token_ids(file: GgufFile) -> int | list[int] | None:
    """End-of-sequence id, and the end-of-turn token that the chat template writes where that is another one."""
    meta = file.metadata
    ids = [
        i for key in ("eos", "eot") if (i := meta.get(f"tokenizer.ggml.{key}_token_id")) is not None
    ]
    template, tokens = (
        str(meta.get("tokenizer.chat_template", "")),
        meta.get("tokenizer.ggml.tokens", []),
    )
    ids += [tokens.index(end) for end in _TURN_ENDS if end in template and end in tokens]
    unique = list(dict.fromkeys(ids))
    return unique if len(unique) > 1 else unique[0] if unique else None


def _llama(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    head_dim = file.number(
        "llama.attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    theta = _tidy(file.number("llama.rope.freq_base", 10000.0))
    scaling = _llama_rope_scaling(file, head_dim, theta)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
    } | ({"rope_scaling": scaling} if scaling else {})


def _llama_rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("llama.rope.scaling.factor")}
    if kind != "none":
        raise UnsupportedError(
            f"{file.path}: rope scaling {kind!r} is not supported (linear and llama3 are)"
        )
    if "rope_freqs.weight" not in file.tensors:
        return None
    stored = file.rows("rope_freqs.weight").reshape(-1).view(np.float32)
    scaling = {"rope_type": "llama3", "factor": _tidy(float(stored.max()))} | _LLAMA3_ROPE
    if len(stored) != head_dim // 2 or not np.allclose(
        stored, llama3_divisors(scaling, head_dim, theta), rtol=1e-3
    ):
        raise UnsupportedError(
            f"{file.path}, tensor 'rope_freqs.weight': is not Llama 3's rope scaling"
        )
    return scaling


def llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What Llama 3's rope scaling divides each of the head_dim/2 frequencies by (transformers `rope_type: llama3`)."""
    context = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _gemma3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    head_dim = file.number("gemma3.attention.key_length", 256)
    theta = _tidy(file.number("gemma3.rope.freq_base", 1000000.0))
    local_theta = _tidy(file.number("gemma3.rope.freq_base_swa", 10000.0))
    factor = file.number("gemma3.rope.scaling.factor", 1.0)
    layers = config["num_hidden_layers"]
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    # Only the 27B model (62 layers) scales queries by hidden_size / heads instead of head_dim.
    query_scalar = (
        config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim
    )
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar,
        "sliding_window": file.number("gemma3.attention.sliding_window", 1024),
        "sliding_window_pattern": 6,
        "layer_types": [
            "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)
        ],
        "rope_theta": theta,
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            "full_attention": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
            "sliding_attention": {"rope_theta": local_theta, "rope_type": "default"},
        },
    } | ({"rope_scaling": scaling} if scaling else {})


def _tidy(value: float) -> float:
    """The short decimal that a float32 in the metadata was written from (1e-05, not 9.999999747378752e-06)."""
    return float(f"{value:.6g}")
