"""Codes to the dense weight, for what many rows are multiplied by: then it is cuBLAS's product."""

import triton
import triton.language as tl


@triton.jit
def dequantize(
    words,
    scales,
    dense,  # [N, K] float16 or bfloat16
    N,
    K,
    padded_out,
    groups,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The dense weight, columns in canonical order. Grid (N tiles, tiles of K)."""
    PLANES: tl.constexpr = 16 // BITS
    DTYPE: tl.constexpr = dense.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = tl.program_id(1)
    packed = tl.load(
        words + k_tile * padded_out * 16 + n[:, None] * 16 + tl.arange(0, 16)[None, :],
        eviction_policy="evict_first",
    )
    packed = packed.reshape(BLOCK_N, 4, 4).permute(0, 2, 1).reshape(BLOCK_N, 16)
    feature = tl.arange(0, 32)
    for plane in tl.static_range(PLANES):
        k = k_tile * (32 * PLANES) + plane * 32 + feature
        group = tl.zeros_like(k) if GROUP == 0 else k // GROUP
        scale, zero, minimum = SCALE(scales, group[None, :], n[:, None], groups, padded_out, BITS)
        even, odd = CODE(packed, tl.zeros((1, 1), tl.float32), plane, BITS, False)
        q = tl.join(even, odd).reshape(BLOCK_N, 32).to(tl.float32)
        value = (q - zero) * scale + minimum
        tl.store(
            dense + n[:, None].to(tl.int64) * K + k[None, :],
            value.to(DTYPE),
            mask=(n[:, None] < N) & (k[None, :] < K),
        )
