"""A scale and a zero point in one 32-bit word: what kernels/dequant_gemm is told of AWQ weights, and of GPTQ ones.

bit of a word   31 ............ 16 | 15 ..... 8 | 7 ....... 0
                the scale's 16     |  0         | zero point      int32 [groups, padded_out]
"""

import triton
import triton.language as tl


@triton.jit
def half_scale_and_zero(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """The scale is a float16."""
    packed = tl.load(scales + group * padded_out + n)
    scale = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, (packed & 0xFF).to(tl.float32), tl.zeros_like(scale)


@triton.jit
def bfloat16_scale_and_zero(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """The scale is a bfloat16."""
    packed = tl.load(scales + group * padded_out + n)
    scale = (packed & -65536).to(tl.float32, bitcast=True)
    return scale, (packed & 0xFF).to(tl.float32), tl.zeros_like(scale)
