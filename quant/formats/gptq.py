"""GPTQ's layout, 2, 3, 4 and 8 bits. Source: AutoGPTQ `nn_modules/qlinear/qlinear_cuda_old.py`, GPTQModel.

    qweight int32 [in*bits/32, out]      natural order along `in`
    qzeros  int32 [ceil(in/g), out*bits/32]   natural order along `out`; "gptq" (v1) stores z - 1, "gptq_v2" stores z
    scales  fp16  [ceil(in/g), out]
    g_idx   int32 [in]                   the group of each input feature; i // g unless made with act-order

w[o, k] = (q - z[g_idx[k]]) * s[g_idx[k]]. The last group may be partial. Where the config says `sym`, z is the midpoint
and qzeros is not consulted (as in vLLM), so a v1/v2 mix-up cannot hurt. v1 cannot say z = 0: it would store -1, which
readers decode differently, so it is never written. "marlin" is another layout, see marlin.py.
"""

import torch
from torch import Tensor

from ..packing import pack, unpack
from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from . import marlin
from .base import FLOATS, check_shape, columns_per_group, need, order_of_groups, refuse, to_half

SUFFIXES = (
    "qweight",
    "scales",
    "qzeros",
    "g_idx",
    "B",
    "s",
    "workspace",
)  # the last three: marlin's


def read(tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "gptq") -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight [out, in]. fmt: "gptq" (v1), "gptq_v2" or "marlin". Raises BadTensor."""
    if fmt == "marlin":
        return marlin.read(tensors, layer, ("B", "s"))
    bits = layer.bits
    qweight = need(tensors, "qweight", torch.int32)
    words, out_features = qweight.shape
    in_features = tensors["g_idx"].numel() if "g_idx" in tensors else words * 32 // bits
    check_shape(
        "qweight",
        qweight,
        -(-in_features // 32) * bits if bits == 3 else -(-in_features * bits // 32),
        out_features,
    )
    scales = need(tensors, "scales", *FLOATS)
    n_groups = scales.shape[0]
    check_shape("scales", scales, n_groups, out_features)
    if "g_idx" in tensors:
        g_idx = need(tensors, "g_idx", torch.int32, torch.int64, ndim=1)
        perm, group = order_of_groups(g_idx, in_features, n_groups, "g_idx")
    else:
        perm, group = None, columns_per_group("scales", in_features, n_groups, layer.group_size)
    codes = unpack(qweight.T.contiguous(), bits, in_features)
    return QuantizedWeight(
        codes=codes if perm is None else codes[:, perm],
        scales=scales.T.contiguous(),
        zeros=_zeros(tensors, layer, fmt, n_groups, out_features),
        perm=perm,
        bits=bits,
        block=(1, group),
    )


def write(weight: QuantizedWeight, fmt: str = "gptq") -> dict[str, Tensor]:
    """QuantizedWeight -> tensors by suffix. Raises ValueError if the layout cannot hold it exactly."""
    bits = weight.bits
    refuse(weight, "GPTQ", bits=(2, 3, 4, 8), perm=True)
    if (
        weight.in_features * bits % 32
        or weight.out_features * bits % 32
        or (bits == 3 and weight.in_features % 32)
    ):
        raise ValueError(
            f"GPTQ cannot hold [{weight.out_features}, {weight.in_features}] at {bits} bits: both must "
            f"fill whole 32-bit words"
        )
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, 2 ** (bits - 1), dtype=torch.uint8)
    if fmt == "gptq":
        if (zeros == 0).any():
            raise ValueError(
                "GPTQ v1 cannot hold a zero point of 0: quantize with zero points from 1, or use gptq_v2"
            )
        zeros = zeros - 1
    g_idx = torch.arange(weight.in_features) // weight.group_size
    codes = weight.codes
    if weight.perm is not None:
        g_idx = torch.empty_like(g_idx).index_put((weight.perm,), g_idx)
        codes = torch.empty_like(codes).index_copy(1, weight.perm, codes)
    return {
        "qweight": pack(codes, bits).T.contiguous(),
        "qzeros": pack(zeros.T.contiguous(), bits),
        "scales": to_half(weight.scales).T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def _zeros(
    tensors: dict[str, Tensor], layer: LayerScheme, fmt: str, n_groups: int, out_features: int
) -> Tensor | None:
    """Zero points uint8 [out, groups]; None for the midpoint."""
    if layer.symmetric and "qzeros" not in tensors:
        return None
    qzeros = need(tensors, "qzeros", torch.int32)
    check_shape("qzeros", qzeros, n_groups, -(-out_features * layer.bits // 32))
    if layer.symmetric:
        return None
    zeros = unpack(qzeros, layer.bits, out_features)
    if fmt == "gptq":
        zeros = (zeros + 1) & (2**layer.bits - 1)
    return zeros.T.contiguous()
