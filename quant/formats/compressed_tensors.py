"""compressed-tensors layouts: pack-quantized, int-quantized, float-quantized, nvfp4- and mxfp4-pack-quantized. Source:
the compressed-tensors package, `compressors/`.

    pack-quantized   weight_packed      int32 [out, ceil(in*bits/32)]    natural order, code = signed + 2**(bits-1)
                     weight_scale       [out, in/g] or [out, 1], in the model's dtype
                     weight_zero_point  int32 [ceil(out*bits/32), in/g]  asymmetric only; packed along `out`
                     weight_shape       int64 [2] = (out, in)
                     weight_g_idx       int32 [in], from older versions' act-order
    int-quantized    weight             int8 [out, in] = signed codes;  weight_scale;  weight_zero_point int8, unpacked
    float-quantized  as in fp8.py
    nvfp4, mxfp4     weight_packed uint8, weight_scale, weight_global_scale, as in fp4.py

w = (signed - zero point) * scale. The tensors that are there say which it is.
"""

import torch
from torch import Tensor

from ..packing import pack, unpack
from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from . import fp4, fp8
from .base import FLOATS, BadTensor, check_shape, columns_per_group, need, order_of_groups, refuse

SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
            "input_scale", "weight_global_scale", "input_global_scale")  # fmt: skip


def read(
    tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "pack-quantized"
) -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight [out, in]. Raises BadTensor."""
    if "weight_packed" in tensors and tensors["weight_packed"].dtype == torch.uint8:
        return fp4.read(tensors["weight_packed"], tensors, layer, "weight_packed")
    if "weight_packed" in tensors:
        return _read_packed(tensors, layer)
    if "weight" in tensors and tensors["weight"].dtype == torch.int8:
        return _read_int(tensors, layer)
    return fp8.read(tensors, layer)


def write(weight: QuantizedWeight, fmt: str = "pack-quantized") -> dict[str, Tensor]:
    """QuantizedWeight -> tensors by suffix for that format. Raises ValueError if it cannot hold the weight exactly."""
    if fmt == "float-quantized":
        return _write_float(weight)
    refuse(weight, "compressed-tensors", bits=(4, 8) if fmt == "pack-quantized" else (8,))
    if fmt == "int-quantized" and weight.zeros is None:
        return {"weight": (weight.codes ^ 128).view(torch.int8), "weight_scale": weight.scales}
    if fmt != "pack-quantized":
        raise ValueError(f"compressed-tensors {fmt} cannot be written for this weight")
    shape = torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64)
    tensors = {
        "weight_packed": _pack_padded(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": shape,
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = _pack_padded(weight.zeros.T, weight.bits).T.contiguous()
    return tensors


def _read_packed(tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
    bits = layer.bits
    packed = need(tensors, "weight_packed", torch.int32)
    shape = need(tensors, "weight_shape", torch.int64, torch.int32, ndim=1)
    check_shape("weight_shape", shape, 2)
    out_features, in_features = shape.tolist()
    if min(out_features, in_features) < 1:
        raise BadTensor("weight_shape", f"is {shape.tolist()}")
    check_shape("weight_packed", packed, out_features, -(-in_features * bits // 32))
    scales = _row_scales(tensors, out_features)
    n_groups = scales.shape[1]
    zeros = None
    if "weight_zero_point" in tensors:
        packed_zeros = need(tensors, "weight_zero_point", torch.int32)
        check_shape("weight_zero_point", packed_zeros, -(-out_features * bits // 32), n_groups)
        zeros = unpack(packed_zeros.T.contiguous(), bits, out_features).T.contiguous()
    codes = unpack(packed, bits, in_features)
    perm, group = None, columns_per_group("weight_scale", in_features, n_groups, layer.group_size)
    if (
        "weight_g_idx" in tensors and (tensors["weight_g_idx"] != -1).any()
    ):  # all -1: not initialised, natural order
        g_idx = need(tensors, "weight_g_idx", torch.int32, torch.int64, ndim=1)
        perm, group = order_of_groups(g_idx, in_features, n_groups, "weight_g_idx")
    return QuantizedWeight(
        codes=codes if perm is None else codes[:, perm],
        scales=scales,
        zeros=zeros,
        perm=perm,
        bits=bits,
        block=(1, group),
        act_quant=layer.act_quant,
    )


def _read_int(tensors: dict[str, Tensor], layer: LayerScheme) -> QuantizedWeight:
    weight = need(tensors, "weight", torch.int8)
    out_features, in_features = weight.shape
    midpoint = 2 ** (layer.bits - 1)
    if layer.bits < 8 and (weight.min() < -midpoint or weight.max() >= midpoint):
        raise BadTensor("weight", f"holds codes outside {layer.bits} bits")
    scales = _row_scales(tensors, out_features)
    zeros = None
    if "weight_zero_point" in tensors and not layer.symmetric:
        stored = need(
            tensors, "weight_zero_point", torch.int8, ndim=tensors["weight_zero_point"].ndim
        )
        zeros = _unsigned(
            stored.reshape(-1, scales.shape[1]).expand(out_features, -1), midpoint
        ).contiguous()
    group = columns_per_group("weight_scale", in_features, scales.shape[1], layer.group_size)
    return QuantizedWeight(
        codes=_unsigned(weight, midpoint),
        scales=scales,
        zeros=zeros,
        bits=layer.bits,
        block=(1, group),
        act_quant=layer.act_quant,
    )


def _unsigned(signed: Tensor, midpoint: int) -> Tensor:
    return (signed.to(torch.int16) + midpoint).to(torch.uint8)


def _row_scales(tensors: dict[str, Tensor], out_features: int) -> Tensor:
    """weight_scale as [out, groups]; one value for the whole tensor is given to each row."""
    if "weight_scale" not in tensors:
        raise BadTensor("weight_scale", "is missing")
    scales = need(tensors, "weight_scale", *FLOATS, ndim=tensors["weight_scale"].ndim)
    if scales.numel() == 1:
        return scales.reshape(1, 1).repeat(out_features, 1)
    if scales.ndim == 1:
        scales = scales.reshape(-1, 1)
    check_shape("weight_scale", scales, out_features, scales.shape[-1])
    return scales


def _pack_padded(codes: Tensor, bits: int) -> Tensor:
    """`pack` along the last axis, which is filled up to whole words with zeros."""
    missing = -codes.shape[1] % (32 // bits)
    return pack(torch.nn.functional.pad(codes, (0, missing)), bits)


def _write_float(weight: QuantizedWeight) -> dict[str, Tensor]:
    if weight.kind != "fp8":
        raise ValueError("float-quantized cannot hold integer weights")
    whole = weight.block == (weight.out_features, weight.in_features)
    static = {} if weight.input_scale is None else {"input_scale": weight.input_scale.reshape(1)}
    return {
        "weight": weight.codes,
        "weight_scale": weight.scales.reshape(-1) if whole else weight.scales,
    } | static
