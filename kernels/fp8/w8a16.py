"""FP8 weights with 16-bit activations (W8A16) on a CUDA device, scales per tensor, output channel or block.

The codes lie in the layout of 8-bit integers (kernels/dequant_gemm) and are decoded to float16 or bfloat16 by moving
their bits, so that it runs on cards without FP8, and few rows cost what reading a byte a weight costs. It serves cards
that w8a8.py refuses, and formats that quantize weights alone. Activations stay as they are, whatever the format asks.
"""

from pathlib import Path

from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..dequant_gemm.layout import Decode, ShuffledWeight, kernel_group, shuffle
from ..dequant_gemm.linear import Prepared, linear, prepared, quantized
from ..device import why_no_triton
from ..spec import LinearSpec

CONFIGS = Path(__file__).parent / "configs" / "w8a16"  # measured tiles of cards


class Fp8W8A16Kernel:
    """y = x W^T with e4m3 codes."""

    name = "fp8-w8a16-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "fp8":
            return f"needs FP8 weights, not {spec.kind}"
        if kernel_group(spec.block[1], spec.in_features, spec.bits) is None:
            return f"needs blocks of a multiple of 16 columns, not {spec.block[1]}"
        return why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        return prepared(repack(quantized(weight, spec)), spec, CONFIGS)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return linear(x, prepared, bias)


def repack(weight: QuantizedWeight) -> ShuffledWeight:
    """Of any blocks that the layout can follow."""
    from .decode import e4m3, float_scale

    return shuffle(weight, Decode(e4m3, float_scale), weight.scales.float())
