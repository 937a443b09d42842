"""FP8 (e4m3) weights with float scales: per tensor, per output channel, or per block.

    weight            float8_e4m3fn [out, in]
    weight_scale      [] or [1] per tensor, [out] or [out, 1] per channel, [ceil(out/b0), ceil(in/b1)] per block
                      ([ceil(out/b0), 1, ceil(in/b1), 1] in ModelOpt's FP8_PB_WO)
    weight_scale_inv  the same under DeepSeek's and transformers' name; despite it, it multiplies
    input_scale       [] or [1], static activation scale (transformers: activation_scale)

w = float(code) * scale. Sources: vLLM `fp8.py`, DeepSeek-V3 `weight_dequant`, transformers `finegrained_fp8.py`.
"""

import torch
from torch import Tensor

from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from .base import FLOATS, BadTensor, check_finite, need

SUFFIXES = ("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale")


def read(tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "fp8") -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight of kind "fp8" [out, in]. Raises BadTensor."""
    weight = need(tensors, "weight", torch.float8_e4m3fn)
    suffix = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    shape = weight.shape[0], weight.shape[1]
    scale, block = scale_grid(tensors, suffix, shape, layer.block)
    static = next((s for s in ("input_scale", "activation_scale") if s in tensors), None)
    input_scale = None
    if static is not None:
        input_scale = check_finite(static, tensors[static]).float().reshape(-1)
        if input_scale.numel() != 1:
            raise BadTensor(static, f"has shape {list(tensors[static].shape)}, want one value")
    return QuantizedWeight(
        codes=weight,
        scales=scale,
        kind="fp8",
        bits=8,
        block=block,
        input_scale=input_scale,
        act_quant=layer.act_quant,
    )


def write(weight: QuantizedWeight, fmt: str = "fp8") -> dict[str, Tensor]:
    """QuantizedWeight -> tensors by suffix; ValueError for channel scales, which only compressed-tensors has."""
    if weight.kind != "fp8":
        raise ValueError("FP8 cannot hold integer weights")
    if weight.block == (weight.out_features, weight.in_features):
        scales = {"weight_scale": weight.scales.float().reshape(())}
    elif weight.block[0] == 1:
        raise ValueError("quant_method fp8 cannot hold channel scales: write compressed-tensors")
    else:
        scales = {"weight_scale_inv": weight.scales.float()}
    static = {} if weight.input_scale is None else {"input_scale": weight.input_scale.reshape(())}
    return {"weight": weight.codes} | scales | static


def scale_grid(
    tensors: dict[str, Tensor],
    suffix: str,
    shape: tuple[int, int],
    configured: tuple[int, int] | None,
) -> tuple[Tensor, tuple[int, int]]:
    """A scale in any of the shapes above -> (scales [rows, columns], block), the shape deciding which it is."""
    if suffix not in tensors:
        raise BadTensor(suffix, "is missing")
    scale = need(tensors, suffix, *FLOATS, ndim=tensors[suffix].ndim)
    out_features, in_features = shape
    if scale.ndim == 4 and scale.shape[1] == scale.shape[3] == 1:  # ModelOpt: [rows, 1, columns, 1]
        scale = scale[:, 0, :, 0]
    if scale.numel() == 1:
        return scale.reshape(1, 1), shape
    if tuple(scale.shape) in ((out_features,), (out_features, 1)):
        return scale.reshape(-1, 1), (1, in_features)
    if configured and tuple(scale.shape) == (
        -(-out_features // configured[0]),
        -(-in_features // configured[1]),
    ):
        return scale, configured
    raise BadTensor(
        suffix,
        f"has shape {list(scale.shape)}, want one value, {out_features} or blocks of "
        f"{configured or 'a weight_block_size'} for a weight {list(shape)}",
    )
