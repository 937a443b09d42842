"""Scales of symmetric weights: what kernels/dequant_gemm is told of GPTQ. Asymmetric ones have AWQ's words."""

import triton
import triton.language as tl


@triton.jit
def symmetric_scale(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """float16 or bfloat16 [groups, padded_out]; the zero point is the middle of the codes, and costs no byte."""
    scale = tl.load(scales + group * padded_out + n).to(tl.float32)
    return scale, tl.zeros_like(scale) + 2.0 ** (BITS - 1), tl.zeros_like(scale)
