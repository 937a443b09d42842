"""HQQ's layout, as transformers and hqq save it to safetensors: codes of rows of groups, float zero points. Only read.

    W_q         uint8 [rows / per, columns]   the weight as [rows, columns], packed from the first row on: a byte holds
                                              rows i, i + rows/per, i + 2 rows/per ..., the first in the highest bits
                int32 [ceil(rows / 10), columns]   3 bits: ten rows a word, the first in bits 27 to 29
    scale, zero float  [rows, 1] with axis 1, [1, columns] with axis 0
    shape       int    [2]           of the weight [out, in]
    axis        int    []            1: [rows, columns] = [out * in / group, group]; 0: [group, out * in / group]
    packing     uint8  [characters]  "8bit_u8", "4bit_u8", "3bit_32", "2bit_u8", "1bit_u8"

w = (code - zero) * scale. With axis 1 and a group that divides the input features this is a QuantizedWeight with
minima; what else there is (axis 0, groups that run on over rows, 1 bit) comes dense.
Source: hqq `core/quantize.py` (Quantizer), `core/bitpack.py`, `core/utils.py` (encode_safetensor_type).
"""

import torch
from torch import Tensor

from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from .base import FLOATS, BadTensor, check_shape, need

_META = (
    "nbits",
    "group_size",
    "view_as_float",
    "unpack_view_dtype",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
    "quant_scale",
    "quant_zero",
)
SUFFIXES = ("W_q", "scale", "zero", "shape", "axis", "packing", *_META)

_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
_VIEWS = (
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)  # "view as float" stores the same bytes


def read(
    tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "hqq"
) -> QuantizedWeight | Tensor:
    """Tensors by suffix -> QuantizedWeight, or the dense weight [out, in]. Raises BadTensor."""
    bits = _packing(tensors)
    out_features, in_features = _shape(tensors)
    scale, zero = (need(tensors, name, *FLOATS, ndim=2) for name in ("scale", "zero"))
    check_shape("zero", zero, *scale.shape)
    axis = int(_integers(tensors, "axis", 1)[0])
    groups = scale.numel()
    group = out_features * in_features // max(groups, 1)
    if axis not in (0, 1) or group * groups != out_features * in_features or scale.shape[axis] != 1:
        raise BadTensor(
            "scale",
            f"has shape {list(scale.shape)}, not that of groups along axis {axis} of a weight "
            f"{[out_features, in_features]}",
        )
    codes = _unpack(tensors, bits, *((groups, group) if axis == 1 else (group, groups)))
    if axis == 0 or in_features % group or bits == 1:
        return (
            ((codes.float() - zero.float()) * scale.float())
            .reshape(out_features, in_features)
            .to(scale.dtype)
        )
    scales, zeros = (t.float().view(out_features, in_features // group) for t in (scale, zero))
    return QuantizedWeight(
        codes.view(out_features, in_features),
        scales,
        mins=-zeros * scales,
        bits=bits,
        block=(1, group),
    )


def _unpack(tensors: dict[str, Tensor], bits: int, rows: int, columns: int) -> Tensor:
    """uint8 codes [rows, columns]."""
    if bits == 3:
        packed = need(tensors, "W_q", torch.int32)
        per = 10
    else:
        packed = need(tensors, "W_q", *_VIEWS).contiguous().view(torch.uint8)
        per = 8 // bits
    check_shape("W_q", packed, -(-rows // per), columns)
    shifts = range(bits * (per - 1), -1, -bits)
    return torch.cat([(packed >> shift & (1 << bits) - 1).to(torch.uint8) for shift in shifts])[
        :rows
    ].contiguous()


def _packing(tensors: dict[str, Tensor]) -> int:
    """Bits a code takes."""
    name = bytes(_integers(tensors, "packing", None).clamp(0, 255).tolist()).decode("latin-1")
    if name not in _BITS:
        raise BadTensor("packing", f"is {name[:40]!r}, want {', '.join(_BITS)}")
    return _BITS[name]


def _shape(tensors: dict[str, Tensor]) -> tuple[int, int]:
    out_features, in_features = map(int, _integers(tensors, "shape", 2))
    if min(out_features, in_features) < 1:
        raise BadTensor("shape", f"is {[out_features, in_features]}")
    return out_features, in_features


def _integers(tensors: dict[str, Tensor], suffix: str, count: int | None) -> Tensor:
    """The whole numbers that a tensor holds, flat."""
    if suffix not in tensors:
        raise BadTensor(suffix, "is missing (Nibble reads what hqq encodes for safetensors)")
    values = tensors[suffix].flatten()
    if values.dtype.is_floating_point or count not in (None, len(values)):
        raise BadTensor(
            suffix,
            f"has shape {list(tensors[suffix].shape)} and type {values.dtype}, want "
            f"{'any number of' if count is None else count} integers",
        )
    return values
