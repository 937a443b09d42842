"""Triton: rows of 16-bit activations to e4m3 codes (arXiv 2209.05433) and float32 scales."""

import triton
import triton.language as tl

from ..fused.rows import row_scale, to_code


@triton.jit
def quantize(
    x,  # [M, K] float16 or bfloat16
    codes,  # uint8 [M, K], bits of e4m3
    scales,  # float32 [groups, M]; static: read, [1]
    x_stride,
    M,
    K,
    groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    STATIC: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Codes and scales of a row, GROUPS groups of GROUP features a program (static: no group means anything).
    Grid (M, ceil(groups / GROUPS))."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if STATIC:
        value *= 1.0 / tl.load(scales)
    else:
        scale = row_scale(value, 1, "fp8")
        tl.store(scales + group * M + row, scale, mask=group < groups)
        value *= (1.0 / scale)[:, None]
    tl.store(codes + row * K + k, to_e4m3(value, NATIVE_FP8).to(tl.uint8, bitcast=True), mask=k < K)


@triton.jit
def to_e4m3(value, NATIVE_FP8: tl.constexpr):
    """float32 to e4m3: to nearest, ties to even; beyond 448 the card's conversion saturates, NaN stays NaN."""
    if NATIVE_FP8:
        return value.to(tl.float8e4nv)
    code = tl.where(value == value, to_code(value, "fp8", False), 0x7F)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
