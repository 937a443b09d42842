"""CPU kernels made of torch's own operators: what serves where the C++ kernels are not built.

`OneDnnDenseKernel`: bf16 products with the weight reordered once for oneDNN (1.5 to 2 times F.linear at small M on a
core with AVX512-BF16). `Int4PackKernel`: torch's weight-only int4 product; its layout depends on the instruction set,
so it is made at load and never stored. With a permuted weight (GPTQ act-order) the activation's columns are gathered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..reference import DenseKernel
from ..spec import LinearSpec

_TYPICAL_ROWS = (
    8  # rows oneDNN should expect; the order of a reordered weight depends on it a little
)


class OneDnnDenseKernel(DenseKernel):
    """Dense bf16 weights, reordered for oneDNN at load."""

    name = "cpu-onednn-bf16"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if reason := super().can_implement(spec):
            return reason
        if spec.device.type != "cpu":
            return f"runs on a CPU, not on {spec.device.type}"
        if spec.act_dtype != torch.bfloat16:
            return f"needs bfloat16 activations, not {spec.act_dtype}; serve with --dtype bfloat16"
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no fast bfloat16 products"
        return None

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Tensor:
        dense = super().prepare(weight, spec).contiguous()
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(dense, _TYPICAL_ROWS)
        return reordered

    def apply(self, x: Tensor, prepared: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, prepared, bias, "none", [], "")
        return y


@dataclass(slots=True)
class _Int4Packed:
    codes: Tensor
    scales_and_offsets: Tensor  # bf16 [in/group, out, 2]: w = (code - 8) * scale + offset
    group_size: int
    perm: Tensor | None


class Int4PackKernel:
    """torch._weight_int4pack_mm_for_cpu. Scales and offsets are rounded to bf16, as every bf16 weight is."""

    name = "cpu-torch-int4"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int" or spec.bits != 4:
            return f"needs 4-bit integer weights, not {spec.bits}-bit {spec.kind}"
        if spec.device.type != "cpu":
            return f"runs on a CPU, not on {spec.device.type}"
        if spec.act_dtype != torch.bfloat16:
            return f"needs bfloat16 activations, not {spec.act_dtype}; serve with --dtype bfloat16"
        if spec.block[1] not in (32, 64, 128, 256) or spec.block[0] != 1:
            return f"needs groups of 32, 64, 128 or 256 columns, not {spec.block[1]}; convert with --group-size 64"
        if spec.in_features % spec.block[1] or spec.out_features % 16:
            return f"needs whole groups and outputs in multiples of 16, not {spec.out_features}x{spec.in_features}"
        return None

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> _Int4Packed:
        if isinstance(weight, Tensor):
            raise TypeError("a dense weight was given to a kernel for quantized ones")
        scales = weight.scales.float()
        if weight.mins is not None:
            offsets = weight.mins.float() + 8 * scales
        elif weight.zeros is not None:
            offsets = (8 - weight.zeros.float()) * scales
        else:
            offsets = torch.zeros_like(scales)
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        pairs = (
            torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        )
        return _Int4Packed(packed, pairs, weight.group_size, weight.perm)

    def apply(self, x: Tensor, prepared: _Int4Packed, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if prepared.perm is not None:
            rows = rows.index_select(1, prepared.perm)
        y = torch._weight_int4pack_mm_for_cpu(
            rows, prepared.codes, prepared.group_size, prepared.scales_and_offsets
        )
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1)
