"""E2M1 codes as 16-bit floats, and their scales: what kernels/dequant_gemm is told of FP4 weights.

bit of a code   3      2  1       0
                sign | exponent | mantissa      0, 1, 2, 3, 4, 6, 8, 12 (halves) and their negatives
"""

import triton
import triton.language as tl

from ..dequant_gemm.decode import INTERPRETED, times


@triton.jit
def e2m1(packed, zero, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Twice the value. Exponent and mantissa move to where a 16-bit float has the low end of its exponent; a power of
    two makes up for the bias. Exact, the subnormal too."""
    high = packed << (12 - 4 * PLANE)
    moved = (high >> 6) & 0x01C001C0 if BF16 else (high >> 3) & 0x0E000E00
    pair = (high & -2147450880) | moved  # the signs, 0x80008000
    if INTERPRETED and BF16:  # whose own conversion loses subnormal bfloat16s
        even = (pair << 16).to(tl.float32, bitcast=True) * 2.0**127
        odd = (pair & -65536).to(tl.float32, bitcast=True) * 2.0**127
        return even.to(tl.bfloat16), odd.to(tl.bfloat16)
    if INTERPRETED:
        even = pair.to(tl.int16).to(tl.float16, bitcast=True) * 2.0**15
        odd = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True) * 2.0**15
        return even, odd
    return times(pair, 0x7F007F00 if BF16 else 0x78007800, BF16)


@triton.jit
def bfloat16_scale(scales, group, n, groups, padded_out, BITS: tl.constexpr):
    """The bits of a bfloat16 in int16 [groups, padded_out]: every power of two that MXFP4 has is one."""
    bits = tl.load(scales + group * padded_out + n)
    scale = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return scale, tl.zeros_like(scale), tl.zeros_like(scale)
