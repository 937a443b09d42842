"""Scales and minima in float32: what kernels/dequant_gemm is told of weights whose scales 16 bits do not hold."""

import triton
import triton.language as tl


@triton.jit
def scale_and_minimum(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """float32 [2, groups, padded_out]: w = code * scale + minimum."""
    scale = tl.load(scales + group * padded_out + n)
    minimum = tl.load(scales + (groups + group) * padded_out + n)
    return scale, tl.zeros_like(scale), minimum
