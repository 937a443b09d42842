"""A GGUF model in Hugging Face terms: tensor names and config.json, as the families in architectures/ say.

    blk.3.attn_q.weight          model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_up_exps.weight     model.layers.3.mlp.experts.0.up_proj.weight, ...: rows of a stack, one expert's each

What llama.cpp's converter (convert_hf_to_gguf.py, conversion/) did to a family's tensors is undone: rows of q and k and
of value heads, weights and biases, back in HF's order (`hf_row_order`, `hf_column_order`), the offset of stored norms
taken off (`norm_offset`), lost axes put back (`hf_shape`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ....architectures.gguf import LINEARS, STACKS, TOP, tidy
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
    if file.metadata.get(f"{arch}.expert_count") and not GGUF[arch].has_experts:
        raise UnsupportedError(f"{file.path}: a {arch} model with experts is not supported")
    return arch


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: in one of the file's, all of it, or the matrix or vector of one expert in a stack."""

    name: str
    expert: int | None = None
    part: tuple[int, int] = (0, 1)  # of that matrix's rows: which of how many


def tensor_names(file: GgufFile) -> dict[str, Place]:
    """HF tensor name -> where it is. Raises CheckpointError for a tensor that has no place in the model."""
    arch = architecture(file)
    family, layers = GGUF[arch], _num_layers(file)
    inner = LINEARS | family.modules
    names: dict[str, Place] = {}
    for gguf_name in file.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([\w.]+?)(?:\.(weight|bias))?", gguf_name)
        block, stem, suffix = match.groups() if match else (None, "", "")
        if gguf_name == "rope_freqs.weight" or (block is not None and int(block) >= layers):
            continue  # of the rotation; of layers that draft tokens
        prefix = "" if block is None else f"model.layers.{block}."
        hf_stem = TOP.get(stem) if block is None else inner.get(stem)
        if block is not None and (own := family.tensors.get(gguf_name.split(".", 2)[2])):
            names[f"{prefix}{own}"] = Place(gguf_name)
        elif block is not None and family.has_experts and stem in STACKS and suffix:
            names |= {f"{prefix}{n}.{suffix}": at for n, at in _of_experts(file, gguf_name, stem)}
        elif hf_stem is None or suffix is None:
            raise CheckpointError(f"is no part of a {arch} model", file=file.path, tensor=gguf_name)
        else:
            names[f"{prefix}{hf_stem}.{suffix}"] = Place(gguf_name)
    return names


def _of_experts(file: GgufFile, gguf_name: str, stem: str) -> Iterator[tuple[str, Place]]:
    """Names within the layer, and where they are, of the matrices (or biases) of a stack."""
    modules = STACKS[stem]
    for expert in range(file.tensors[gguf_name].shape[0]):
        for index, module in enumerate(modules):
            yield module.replace("*", str(expert)), Place(gguf_name, expert, (index, len(modules)))


def _num_layers(file: GgufFile) -> Any:
    """Without those that draft tokens, which come last."""
    arch = architecture(file)
    blocks = file.number(f"{arch}.block_count")
    drafting = f"{arch}.nextn_predict_layers"
    return blocks - (file.number(drafting) if file.metadata.get(drafting) else 0)


def hf_shape(file: GgufFile, place: Place) -> tuple[int, ...]:
    """As HF has it: filters [channels, 1, taps], a gate [1, hidden]."""
    shape, stem = file.tensors[place.name].shape, place.name.split(".")[-2]
    if place.expert is not None:
        _, rows, *width = shape
        return (rows // place.part[1], *width)
    if stem == "ssm_conv1d" and len(shape) == 2:
        return shape[0], 1, shape[1]
    if stem == "ffn_gate_inp_shexp" and len(shape) == 1:
        return 1, shape[0]
    return shape


def hf_rows(file: GgufFile, place: Place) -> tuple[int, int]:
    """Rows of the file's tensor, all axes but the last as one, that are this one: from .. to."""
    shape = file.tensors[place.name].shape
    if place.expert is None:
        return 0, prod(shape[:-1])
    if len(shape) == 2:  # of biases, one row an expert
        return place.expert, place.expert + 1
    index, count = place.part
    size = shape[1] // count
    first = place.expert * shape[1] + index * size
    return first, first + size


def hf_values(place: Place, values: Any) -> Any:
    """A vector as HF stores it: A_log where GGUF has -exp(A_log), and of stacked gates and ups its own half. values: a
    torch tensor."""
    index, count = place.part
    if count > 1 and values.ndim == 1:
        return values.chunk(count)[index]
    return (-values).log() if place.name.endswith(".ssm_a") else values


def _value_head_order(file: GgufFile, before: int, dim: int) -> np.ndarray:
    """Where features of value heads are, each of `dim`, behind `before` others. HF has the heads of a key head side by
    side, llama.cpp those of all key heads in turn."""
    arch = file.metadata["general.architecture"]
    keys, values = file.number(f"{arch}.ssm.group_count"), file.number(f"{arch}.ssm.time_step_rank")
    places = np.arange(values * dim).reshape(values // keys, keys, dim).swapaxes(0, 1).reshape(-1)
    return np.concatenate((np.arange(before), before + places))


def hf_column_order(file: GgufFile, gguf_name: str) -> np.ndarray | None:
    """Column index that puts the inputs of a matrix in HF's order; None where they are."""
    if not _has_other_value_heads(file) or not gguf_name.endswith(".ssm_out.weight"):
        return None
    return _value_head_order(file, 0, _value_dim(file))


def _has_other_value_heads(file: GgufFile) -> bool:
    arch = file.metadata["general.architecture"]
    if not GGUF[arch].value_heads:
        return False
    keys, values = file.number(f"{arch}.ssm.group_count"), file.number(f"{arch}.ssm.time_step_rank")
    return bool(keys != values)


def _value_dim(file: GgufFile) -> int:
    arch = file.metadata["general.architecture"]
    inner = file.number(f"{arch}.ssm.inner_size")
    return int(inner // file.number(f"{arch}.ssm.time_step_rank"))


_BY_VALUE_HEAD = ("ssm_a", "ssm_alpha", "ssm_beta", "ssm_dt")  # one row each


def _value_row_order(file: GgufFile, gguf_name: str) -> np.ndarray | None:
    stem, dim = gguf_name.split(".")[2], _value_dim(file)
    if stem in _BY_VALUE_HEAD:
        return _value_head_order(file, 0, 1)
    if stem == "attn_gate":
        return _value_head_order(file, 0, dim)
    if stem not in ("attn_qkv", "ssm_conv1d"):
        return None
    values = dim * file.number(f"{file.metadata['general.architecture']}.ssm.time_step_rank")
    return _value_head_order(file, file.tensors[gguf_name].shape[0] - values, dim)


def hf_row_order(file: GgufFile, gguf_name: str) -> np.ndarray | None:
    """Row index [rows] that puts a tensor's rows in HF's order; None where GGUF keeps HF's order."""
    arch = file.metadata["general.architecture"]
    if _has_other_value_heads(file) and gguf_name.startswith("blk."):
        return _value_row_order(file, gguf_name)
    heads_key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(gguf_name.split(".")[-2])
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
    has_none = "norm" not in gguf_name or "ssm_norm" in gguf_name
    return 0.0 if has_none else GGUF[file.metadata["general.architecture"]].norm_offset


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
        "intermediate_size": _intermediate_size(file),
        "num_hidden_layers": _num_layers(file),
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


def _intermediate_size(file: GgufFile) -> int:
    """Of a dense MLP; models that have only experts may have only their width."""
    arch = architecture(file)
    experts = file.metadata.get(f"{arch}.expert_feed_forward_length")
    return int(file.number(f"{arch}.feed_forward_length", experts))


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
