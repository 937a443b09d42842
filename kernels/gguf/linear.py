"""The linear layer of weights with minima on a CUDA device, and of all whose scales 16 bits do not hold: GGUF's
k-quants multiply a 16-bit scale by one of 4 to 6 bits. Both lie in float32; a zero point becomes -zero * scale.

5- and 6-bit codes, and codebooks, have no product yet: the kernel refuses them, and they are dequantized on every call.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..dequant_gemm.layout import Decode, ShuffledWeight, shuffle
from ..dequant_gemm.linear import Prepared, linear, prepared, quantized, why_no_layout
from ..device import why_no_triton
from ..spec import LinearSpec

CONFIGS = Path(__file__).parent / "configs"  # measured tiles of cards


class GgufKernel:
    """2-, 3-, 4- and 8-bit weights with minima, or with float32 scales."""

    name = "gguf-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int":
            return f"needs integer weights, not {spec.kind}"
        if spec.bits not in (2, 3, 4, 8):
            return (
                f"has no product for {spec.bits}-bit codes, which are dequantized on every call; "
                "a file with 4- or 8-bit weights (Q4_K, Q8_0) is faster"
            )
        if spec.zero != "mins" and spec.scale_dtype != torch.float32:
            return "needs minima, or scales that 16 bits do not hold"
        return why_no_layout(spec) or why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        return prepared(repack(quantized(weight, spec)), spec, CONFIGS)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return linear(x, prepared, bias)


def repack(weight: QuantizedWeight) -> ShuffledWeight:
    """Of any scales and zero points: float32 holds them."""
    from ..dequant_gemm.decode import integers
    from .decode import scale_and_minimum

    scales = weight.scales.float()
    if weight.mins is not None:
        minima = weight.mins.float()
    else:
        zeros = weight.zeros.float() if weight.zeros is not None else 2 ** (weight.bits - 1)
        minima = -scales * zeros
    return shuffle(weight, Decode(integers, scale_and_minimum, True), scales, minima)
