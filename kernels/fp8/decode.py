"""e4m3 codes as 16-bit floats, and their float32 scales: what kernels/dequant_gemm is told of W8A16."""

import triton
import triton.language as tl

from ..dequant_gemm.decode import INTERPRETED, times


@triton.jit
def e4m3(packed, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Sign, exponent and mantissa moved to where a 16-bit float has them; a power of two makes up for the bias. Exact,
    subnormals too; the code for NaN becomes 480."""
    high = packed << (8 - 8 * PLANE)
    moved = (high >> 4) & 0x07F007F0 if BF16 else (high >> 1) & 0x3F803F80
    pair = (high & -2147450880) | moved  # the signs, 0x80008000
    if INTERPRETED:
        DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        FACTOR: tl.constexpr = 2.0**120 if BF16 else 256.0
        even = pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * FACTOR
        odd = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32) * FACTOR
        return even.to(DTYPE), odd.to(DTYPE)
    return times(pair, 0x7B807B80 if BF16 else 0x5C005C00, BF16)


@triton.jit
def float_scale(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """float32 [groups, padded_out]: w = code * scale."""
    scale = tl.load(scales + group * padded_out + n)
    return scale, tl.zeros_like(scale), tl.zeros_like(scale)
