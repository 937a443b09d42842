"""A GGUF model in Hugging Face terms: tensor names and config.json, as the families in architectures/ say.

What llama.cpp's converter (convert_hf_to_gguf.py) did to a family's tensors is undone: rows of q and k, weights and
biases, back in HF's order (`hf_row_order`), the offset of stored norms taken off (`norm_offset`).
"""

import re
from typing import Any

import numpy as np

from ....architectures.gguf import LINEARS, TOP, tidy
from ....architectures.limits import SIZES
from ....architectures.registry import GGUF
from ....errors import CheckpointError, UnsupportedError
from .container import GgufFile

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def architecture(file: GgufFile) -> str:
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF:
        raise UnsupportedError(
            f"{file.path}: GGUF architecture {arch!r} is not supported ({', '.join(GGUF)} are)"
        )
    if file.metadata.get(f"{arch}.expert_count"):
        raise UnsupportedError(f"{file.path}: mixture-of-experts GGUF files are not supported")
    return arch


def tensor_names(file: GgufFile) -> dict[str, str]:
    """HF tensor name -> GGUF tensor name. Raises CheckpointError for a tensor that has no place in the model."""
    arch = architecture(file)
    inner = LINEARS | GGUF[arch].norms
    names: dict[str, str] = {}
    for gguf_name in file.tensors:
        if gguf_name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
        block, stem, suffix = match.groups() if match else (None, "", "")
        hf_stem = TOP.get(stem) if block is None else inner.get(stem)
        if hf_stem is None:
            raise CheckpointError(f"is no part of a {arch} model", file=file.path, tensor=gguf_name)
        prefix = "" if block is None else f"model.layers.{block}."
        names[f"{prefix}{hf_stem}.{suffix}"] = gguf_name
    return names


def hf_row_order(file: GgufFile, gguf_name: str) -> np.ndarray | None:
    """Row index [rows] that puts a llama q or k tensor in HF's order; None where GGUF keeps HF's order."""
    heads_key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(gguf_name.split(".")[-2])
    arch = file.metadata["general.architecture"]
    if heads_key is None or not GGUF[arch].interleaved_heads:
        return None
    heads = file.number(
        f"{arch}.attention.{heads_key}", file.number(f"{arch}.attention.head_count")
    )
    rows = file.tensors[gguf_name].shape[0]
    if rows % (2 * heads):
        raise CheckpointError(
            f"has {rows} rows, which are not {heads} heads", file=file.path, tensor=gguf_name
        )
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def norm_offset(file: GgufFile, gguf_name: str) -> float:
    """What to subtract from a stored norm weight to get HF's."""
    return GGUF[file.metadata["general.architecture"]].norm_offset if "norm" in gguf_name else 0.0


def synthesize_config(file: GgufFile) -> dict[str, Any]:
    """config.json as transformers would have written it for the model in the file."""
    arch = architecture(file)
    meta = file.metadata
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(
            "is missing",
            file=file.path,
            tensor="token_embd.weight",
            fix="give the file of a whole language model",
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
        "rms_norm_eps": tidy(file.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(file),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
        "use_cache": True,
    }
    for name, limit in SIZES.items():
        if not isinstance(config.get(name, 1), int) or not config.get(name, 1) <= limit:
            raise CheckpointError(
                f"its metadata give {config[name]} as {name}, want an integer up to {limit}",
                file=file.path,
            )
    return config | GGUF[arch].config(file, config)


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
