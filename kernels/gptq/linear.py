"""The linear layer of GPTQ weights on a CUDA device. A group has AWQ's word; the zero point of a symmetric one is the
middle of its codes. Act-order gathers the activations' columns before the product.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..awq.linear import repack as with_zeros
from ..dequant_gemm.layout import ShuffledWeight
from ..dequant_gemm.linear import Prepared, linear, prepared, quantized, why_no_layout
from ..device import why_no_triton
from ..spec import LinearSpec

CONFIGS = Path(__file__).parent / "configs"  # measured tiles of cards


class GptqKernel:
    """2-, 3-, 4- and 8-bit weights, symmetric or with zero points."""

    name = "gptq-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int" or spec.bits not in (2, 3, 4, 8):
            return f"needs 2-, 3-, 4- or 8-bit integer weights, not {spec.bits}-bit {spec.kind}"
        if spec.zero == "mins":
            return "needs symmetric weights or zero points, not minima"
        if spec.scale_dtype == torch.float32:
            return "needs scales that 16 bits hold"
        return why_no_layout(spec) or why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        return prepared(repack(quantized(weight, spec)), spec, CONFIGS)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return linear(x, prepared, bias)


def repack(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> ShuffledWeight:
    """Symmetric or with zero points; scales that float16 or bfloat16 hold. dtype: as awq's."""
    if weight.zeros is not None:
        return with_zeros(weight, dtype)
    middle = torch.full_like(weight.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)
    return with_zeros(replace(weight, zeros=middle), dtype)
