"""The linear layer of FP4 weights on a CUDA device, activations in 16 bits: it runs on cards without FP4.

Codes lie in the layout of 4-bit integers (kernels/dequant_gemm). MXFP4's scales are powers of two and take 16 bits;
NVFP4's, of e4m3 and one float32 for the whole tensor, take 32.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...quant.formats.fp4 import E2M1
from ...quant.weight import QuantizedWeight
from ..dequant_gemm.layout import Decode, ShuffledWeight, shuffle
from ..dequant_gemm.linear import Prepared, linear, prepared, quantized, why_no_layout
from ..device import why_no_triton
from ..spec import LinearSpec, fits

CONFIGS = Path(__file__).parent / "configs"  # measured tiles of cards


class Fp4Kernel:
    """y = x W^T with E2M1 codes."""

    name = "fp4-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "table":
            return f"needs FP4 weights, not {spec.kind}"
        if spec.table != E2M1:
            return f"decodes E2M1, not the table {spec.table}"
        return why_no_layout(spec) or why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        return prepared(repack(quantized(weight, spec)), spec, CONFIGS)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return linear(x, prepared, bias)


def repack(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> ShuffledWeight:
    """dtype: that holds the scales, bfloat16 or float32; None: the narrower one that does."""
    from ..fp8.decode import float_scale
    from .decode import bfloat16_scale, e2m1

    if dtype is None:
        dtype = torch.bfloat16 if fits(weight.scales, torch.bfloat16) else torch.float32
    if dtype == torch.float32:
        return shuffle(weight, Decode(e2m1, float_scale), weight.scales.float())
    return shuffle(weight, Decode(e2m1, bfloat16_scale), weight.scales.to(dtype).view(torch.int16))
