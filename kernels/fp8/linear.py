"""FP8 weights with 16-bit activations (W8A16) on a CUDA device, scales per tensor, output channel or block.

The codes lie in the layout of 8-bit integers (kernels/gptq/layout.py) and are decoded to float16 or bfloat16 by moving
their bits, so that it runs on cards without FP8, and few rows cost what reading a byte a weight costs. It serves cards
that w8a8.py refuses, and formats that quantize weights alone. Activations stay as they are, whatever the format asks.
"""

from ..gptq.layout import kernel_group
from ..gptq.linear import TritonIntKernel, why_no_triton
from ..spec import LinearSpec


class TritonFp8Kernel(TritonIntKernel):
    """y = x W^T with e4m3 codes."""

    name = "triton-fp8-w8a16"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "fp8":
            return f"needs FP8 weights, not {spec.kind}"
        if kernel_group(spec.block[1], spec.in_features, spec.bits) is None:
            return f"needs blocks of a multiple of 16 columns, not {spec.block[1]}"
        return why_no_triton(spec.device, spec.act_dtype)
