"""The linear layer of AWQ weights on a CUDA device: a group's scale and zero point share a word (decode.py)."""

from pathlib import Path

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..dequant_gemm.layout import Decode, ShuffledWeight, shuffle
from ..dequant_gemm.linear import Prepared, linear, prepared, quantized, why_no_layout
from ..device import why_no_triton
from ..errors import KernelArgumentError
from ..spec import LinearSpec, scale_dtype

CONFIGS = Path(__file__).parent / "configs"  # measured tiles of cards


class AwqKernel:
    """4-bit weights, a zero point for each group."""

    name = "awq-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int" or spec.bits != 4:
            return f"needs 4-bit integer weights, not {spec.bits}-bit {spec.kind}"
        if spec.zero != "zeros":
            return (
                f"needs zero points, not {'minima' if spec.zero == 'mins' else 'symmetric weights'}"
            )
        if spec.permuted:
            return "needs input columns in their own order, not act-order's"
        if spec.scale_dtype == torch.float32:
            return "needs scales that 16 bits hold"
        return why_no_layout(spec) or why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        return prepared(repack(quantized(weight, spec)), spec, CONFIGS)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return linear(x, prepared, bias)


def repack(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> ShuffledWeight:
    """With zero points, and scales that float16 or bfloat16 hold. Also of other bits than AWQ has.

    dtype: of the two, the one that holds them; None: float16 if it does.
    """
    from ..dequant_gemm.decode import integers
    from .decode import bfloat16_scale_and_zero, half_scale_and_zero

    if weight.zeros is None:
        raise KernelArgumentError("a weight without zero points was given to a kernel for them")
    dtype = dtype or scale_dtype(weight.scales)
    scale = half_scale_and_zero if dtype == torch.float16 else bfloat16_scale_and_zero
    words = (weight.scales.to(dtype).view(torch.int16).int() << 16) | weight.zeros.int()
    return shuffle(weight, Decode(integers, scale), words)
