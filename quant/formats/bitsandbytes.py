"""bitsandbytes' layouts: 4-bit codes into a table of 16 values (NF4, FP4), and 8-bit rows (LLM.int8()). Only ever read.

    4 bits  weight                uint8 [out*in/2, 1]   code of an even element in the high nibble, row after row
            weight.quant_map      float32 [16]          what each code stands for
            weight.absmax         float32 [blocks]      one for each `blocksize` elements, whatever the rows
            weight.quant_state.bitsandbytes__nf4  uint8: JSON with shape, dtype, blocksize, nested_...
      nested (double quantization): weight.absmax uint8 [blocks], and
            absmax = nested_quant_map[code] * nested_absmax[block // nested_blocksize] + nested_offset
    8 bits  weight                int8 [out, in];  SCB float32 [out]:  w = weight * SCB / 127

A table of values is no grid, so `QuantizedWeight` cannot hold 4 bits of this; both are given back dense.
Source: bitsandbytes `functional.py` (QuantState, dequantize_4bit), `nn/modules.py` (Linear8bitLt).
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import FLOATS, BadTensor, check_shape, need

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
SUFFIXES = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *STATES,
    "SCB",
    "weight_format",
)  # beside the weight itself
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class State:
    """What the JSON beside a 4-bit weight says."""

    shape: tuple[int, ...]  # (out, in), once it is checked
    dtype: torch.dtype
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def read_state(suffix: str, raw: Tensor) -> State:
    """The JSON in a uint8 tensor, checked. Raises BadTensor."""
    try:
        fields: dict[str, Any] = json.loads(bytes(raw.tolist()))
        state = State(
            tuple(map(int, fields["shape"])),
            _DTYPES[fields["dtype"]],
            int(fields["blocksize"]),
            int(fields.get("nested_blocksize", 1)),
            float(fields.get("nested_offset", 0)),
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise BadTensor(suffix, f"is no quantization state: {error!r}") from None
    if len(state.shape) != 2 or min(*state.shape, state.blocksize, state.nested_blocksize) < 1:
        raise BadTensor(suffix, f"has shape {list(state.shape)} and blocks of {state.blocksize}")
    return state


def dequantize_4bit(tensors: dict[str, Tensor], state: State) -> Tensor:
    """The dense weight [out, in] in the dtype that the state names. Raises BadTensor."""
    numel = state.shape[0] * state.shape[1]
    packed = need(tensors, "weight", torch.uint8, ndim=tensors["weight"].ndim).flatten()
    check_shape("weight", packed, -(-numel // 2))
    table = need(tensors, "weight.quant_map", *FLOATS, ndim=1)
    check_shape("weight.quant_map", table, 16)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel].long()
    absmax = _absmax(tensors, state, -(-numel // state.blocksize))
    return (
        (table[codes] * absmax.repeat_interleave(state.blocksize)[:numel])
        .reshape(state.shape)
        .to(state.dtype)
    )


def dequantize_8bit(tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in]. Raises BadTensor."""
    weight, scale = need(tensors, "weight", torch.int8), need(tensors, "SCB", *FLOATS, ndim=1)
    check_shape("SCB", scale, weight.shape[0])
    if tensors.get("weight_format", torch.zeros(1)).any():
        raise BadTensor(
            "weight_format", "is not row-major: save the model with a newer bitsandbytes"
        )
    return (weight.float() * (scale.float() / 127).unsqueeze(1)).to(dtype)


def _absmax(tensors: dict[str, Tensor], state: State, blocks: int) -> Tensor:
    """float32 [blocks], the second quantization undone."""
    if "weight.nested_absmax" not in tensors:
        absmax = need(tensors, "weight.absmax", *FLOATS, ndim=1)
        check_shape("weight.absmax", absmax, blocks)
        return absmax.float()
    codes = need(tensors, "weight.absmax", torch.uint8, ndim=1)
    check_shape("weight.absmax", codes, blocks)
    table, nested = (
        need(tensors, f"weight.nested_{name}", *FLOATS, ndim=1) for name in ("quant_map", "absmax")
    )
    check_shape("weight.nested_quant_map", table, 256)
    check_shape("weight.nested_absmax", nested, -(-blocks // state.nested_blocksize))
    spread = nested.repeat_interleave(state.nested_blocksize)[:blocks]
    return table[codes.long()] * spread + state.nested_offset
