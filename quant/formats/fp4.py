"""FP4 (E2M1) weights: sixteen values, two codes a byte, the even column in the low four bits.

    MXFP4  packed  uint8 [out, in/2]   scale  uint8 [out, in/32] = exponent + 127 (E8M0)
    NVFP4  packed  uint8 [out, in/2]   scale  float8_e4m3fn [out, in/16], and one float32 for the whole tensor, which
                                       compressed-tensors divides by (weight_global_scale) and ModelOpt multiplies by
                                       (weight_scale_2)

w = value(code) * scale. Values are 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; QuantizedWeight's table has them
twice as large, and whole. Sources: OCP Microscaling Formats 1.0; the compressed-tensors package, `compressors/nvfp4`
and `mxfp4`; TensorRT Model Optimizer.
"""

import torch
from torch import Tensor

from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from .base import BadTensor, check_finite, check_shape, need

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # halves


def read(
    packed: Tensor, tensors: dict[str, Tensor], layer: LayerScheme, name: str
) -> QuantizedWeight:
    """packed: the tensor called `name`; its scale is weight_scale. Raises BadTensor."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise BadTensor(name, f"has dtype {packed.dtype}, want uint8 [out, in / 2]")
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    scales = _scales(tensors)
    group = in_features // max(1, scales.shape[1])
    check_shape("weight_scale", scales, out_features, scales.shape[1])
    if scales.shape[1] * group != in_features:
        raise BadTensor(
            "weight_scale", f"has {scales.shape[1]} groups, which do not divide {in_features}"
        )
    return QuantizedWeight(codes, scales * 0.5, kind="table", table=E2M1, block=(1, group))


def _scales(tensors: dict[str, Tensor]) -> Tensor:
    """float32 [out, groups], whichever of the two formats it is."""
    if "weight_scale" in tensors and tensors["weight_scale"].dtype == torch.uint8:
        exponents = need(tensors, "weight_scale", torch.uint8)
        if (exponents == 255).any():
            raise BadTensor("weight_scale", "holds NaN or infinity")
        return torch.exp2(exponents.float() - 127)
    scales = need(tensors, "weight_scale", torch.float8_e4m3fn).float()
    if "weight_global_scale" in tensors:
        return scales / _one(tensors, "weight_global_scale")
    return scales * _one(tensors, "weight_scale_2")


def _one(tensors: dict[str, Tensor], suffix: str) -> Tensor:
    """A single positive number."""
    if suffix not in tensors:
        raise BadTensor(suffix, "is missing")
    value = check_finite(suffix, tensors[suffix]).float().reshape(-1)
    if value.numel() != 1 or value[0] <= 0:
        raise BadTensor(suffix, f"has shape {list(tensors[suffix].shape)}, want one positive value")
    return value
