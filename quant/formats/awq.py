"""AutoAWQ's layouts, 4 bits. Source: AutoAWQ `awq/modules/linear/`, `awq/utils/packing_utils.py`.

    gemm  qweight int32 [in, out/8]     word c of a row holds outputs 8c + (0 2 4 6 1 3 5 7)
          qzeros  int32 [in/g, out/8]   the same packing, the zero point itself
          scales  fp16  [in/g, out]
    gemv  qweight int32 [out, in/8]     natural order along `in`
          qzeros  int32 [out, W]        natural order; W words, at least ceil(in/g / 8), the rest is padding
          scales  fp16  [out, 8 W]
    marlin     see marlin.py
    gemv_fast  qweight int16 [out/4, in]   see `_unpack_fast`
          qzeros  fp16  [8 W, out]        -s z, rounded: a minimum, no zero point (llm-awq: scaled_zeros)
          scales  fp16  [8 W, out]

w = (q - z) * s. Without qzeros the midpoint 8 is meant.
"""

import torch
from torch import Tensor

from ..packing import AWQ_ORDER, pack_awq, unpack, unpack_awq
from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from . import marlin
from .base import FLOATS, BadTensor, check_shape, columns_per_group, need, refuse, to_half

SUFFIXES = ("qweight", "scales", "qzeros", "scaled_zeros")


def read(tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "gemm") -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight [out, in]. fmt: "gemm", "gemv", "gemv_fast", "marlin". Raises BadTensor."""
    if fmt == "marlin":
        return marlin.read(tensors, layer, ("qweight", "scales"))
    return {"gemv": _read_gemv, "gemv_fast": _read_gemv_fast}.get(fmt, _read_gemm)(tensors, layer)


def write(weight: QuantizedWeight, fmt: str = "gemm") -> dict[str, Tensor]:
    """QuantizedWeight -> the GEMM tensors by suffix. Raises ValueError if the layout cannot hold it exactly."""
    refuse(weight, "AWQ", bits=(4,))
    if fmt != "gemm" or weight.in_features % weight.group_size or weight.out_features % 8:
        raise ValueError(
            f"AWQ {fmt} cannot hold [{weight.out_features}, {weight.in_features}] in groups of "
            f"{weight.group_size}: want gemm, out a multiple of 8, in a multiple of the group"
        )
    zeros = (
        torch.full_like(weight.scales, 8, dtype=torch.uint8)
        if weight.zeros is None
        else weight.zeros
    )
    return {
        "qweight": pack_awq(weight.codes.T.contiguous()),
        "qzeros": pack_awq(zeros.T.contiguous()),
        "scales": to_half(weight.scales).T.contiguous(),
    }


def _read_gemm(tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
    qweight = need(tensors, "qweight", torch.int32)
    in_features, out_features = qweight.shape[0], qweight.shape[1] * 8
    scales = need(tensors, "scales", *FLOATS)
    n_groups = scales.shape[0]
    check_shape("scales", scales, n_groups, out_features)
    group = columns_per_group("scales", in_features, n_groups, layer.group_size)
    zeros = None
    if "qzeros" in tensors:
        qzeros = need(tensors, "qzeros", torch.int32)
        check_shape("qzeros", qzeros, n_groups, out_features // 8)
        zeros = unpack_awq(qzeros).T.contiguous()
    return QuantizedWeight(
        codes=unpack_awq(qweight).T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=zeros,
        bits=4,
        block=(1, group),
    )


def _read_gemv(tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
    qweight = need(tensors, "qweight", torch.int32)
    out_features, in_features = qweight.shape[0], qweight.shape[1] * 8
    group = in_features if layer.group_size == -1 else layer.group_size
    n_groups = -(-in_features // group)
    scales, qzeros = need(tensors, "scales", *FLOATS), need(tensors, "qzeros", torch.int32)
    check_shape("scales", scales, out_features, qzeros.shape[1] * 8)
    if scales.shape[1] < n_groups:
        raise BadTensor("scales", f"has {scales.shape[1]} groups, want at least {n_groups}")
    check_shape("qzeros", qzeros, out_features, scales.shape[1] // 8)
    return QuantizedWeight(
        codes=unpack(qweight, 4),
        scales=scales[:, :n_groups].contiguous(),
        zeros=unpack(qzeros, 4)[:, :n_groups].contiguous(),
        bits=4,
        block=(1, group),
    )


def _read_gemv_fast(tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
    qweight, scales = need(tensors, "qweight", torch.int16), need(tensors, "scales", *FLOATS)
    suffix = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    mins = need(tensors, suffix, *FLOATS)
    out_features, in_features = qweight.shape[0] * 4, qweight.shape[1]
    if in_features % 64:
        raise BadTensor("qweight", f"has {in_features} columns, want a multiple of 64")
    group = in_features if layer.group_size == -1 else layer.group_size
    n_groups = -(-in_features // group)
    check_shape("scales", scales, scales.shape[0], out_features)
    if scales.shape[0] < n_groups:
        raise BadTensor("scales", f"has {scales.shape[0]} groups, want at least {n_groups}")
    check_shape(suffix, mins, *scales.shape)
    return QuantizedWeight(
        codes=_unpack_fast(qweight),
        scales=scales[:n_groups].T.contiguous(),
        mins=mins[:n_groups].T.float().contiguous(),
        bits=4,
        block=(1, group),
    )


def _unpack_fast(words: Tensor) -> Tensor:
    """int16 [out/4, in] -> uint8 codes [out, in].

    Four rows share the words of 64 columns: their 4 x 64 codes, row after row, fill the nibbles of 64 words in order.
    Within a row, each 32 columns are permuted twice: a 4 x 4 grid of pairs transposed, then each 8 to 0 2 4 6 1 3 5 7.
    """
    quads, in_features = words.shape
    shifts = torch.arange(0, 16, 4)
    nibbles = (words.to(torch.int32).unsqueeze(-1) >> shifts) & 15  # [out/4, in, 4]
    rows = (
        nibbles.reshape(quads, in_features // 64, 4, 64)
        .transpose(1, 2)
        .reshape(quads * 4, in_features // 32, 32)
    )
    pairs = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 8)
    source = pairs[:, list(AWQ_ORDER)].flatten()  # permuted column i came from column source[i]
    codes = torch.empty_like(rows).index_copy_(2, source, rows)
    return codes.reshape(quads * 4, in_features).to(torch.uint8)
