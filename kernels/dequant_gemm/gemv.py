"""GEMV: the product of few rows without tensor cores, for whatever `decode.py` makes numbers of."""

import triton
import triton.language as tl

from .decode import planes_per_group
from .split_k import finish


@triton.jit
def _pair(x, perm, at, K, EVEN_K: tl.constexpr):
    """Features 2 at and 2 at + 1 as float32: one load where a row holds an even number of them, in their own order."""
    if perm is not None:
        even = tl.load(perm + 2 * at, mask=2 * at < K, other=0)
        odd = tl.load(perm + 2 * at + 1, mask=2 * at + 1 < K, other=0)
        return (
            tl.load(x + even, mask=2 * at < K, other=0.0).to(tl.float32),
            tl.load(x + odd, mask=2 * at + 1 < K, other=0.0).to(tl.float32),
        )
    elif EVEN_K:
        pair = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + at)
        if x.dtype.element_ty == tl.bfloat16:
            return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(
                tl.float32, bitcast=True
            )
        return (
            pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    else:
        return (
            tl.load(x + 2 * at, mask=2 * at < K, other=0.0).to(tl.float32),
            tl.load(x + 2 * at + 1, mask=2 * at + 1 < K, other=0.0).to(tl.float32),
        )


@triton.jit
def dot_row(
    x,  # one row
    perm,
    words,
    scales,
    n,
    K,
    padded_out,
    k_tiles,
    groups,
    split,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """float32 [BLOCK_N]: one row times the outputs' weights. Arguments as gemm.py's accumulate has them.

    float32 FMA on whole words, one reduction over the words at the end. A thread's loads are 128 bits of weights."""
    PLANES: tl.constexpr = 16 // BITS
    PER_GROUP: tl.constexpr = planes_per_group(PLANES, GROUP)
    word = tl.arange(0, 16)
    pair = 4 * (word % 4) + word // 4
    weight_at = words + n[:, None] * 16 + word[None, :]
    acc = tl.zeros((BLOCK_N, 16), tl.float32)
    for k_tile in range(split, k_tiles, SPLIT_K):
        packed = tl.load(weight_at + k_tile * padded_out * 16, eviction_policy="evict_first")
        for plane in tl.static_range(PLANES):
            first = k_tile * (32 * PLANES) + plane * 32
            at = (k_tile * (16 * PLANES) + plane * 16 + pair)[None, :]
            if plane % PER_GROUP == 0:
                group = at // 8 if GROUP == 16 else 0 if GROUP == 0 else first // GROUP
                scale, zero, minimum = SCALE(scales, group, n[:, None], groups, padded_out, BITS)
                group_acc = tl.zeros_like(acc)
            x_even, x_odd = _pair(x, perm, at, K, EVEN_K)
            even, odd = CODE(packed, zero, plane, BITS, False)  # float16 holds the codes of either
            group_acc += x_even * even.to(tl.float32)
            group_acc += x_odd * odd.to(tl.float32)
            if (plane + 1) % PER_GROUP == 0:
                acc += group_acc * scale
            if HAS_MINIMUM:
                acc += (x_even + x_odd) * minimum
    return tl.sum(acc, 1)


@triton.jit
def gemv(
    x,
    words,
    scales,
    bias,
    y,
    partials,
    locks,
    M,
    N,
    K,
    padded_out,
    k_tiles,
    groups,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Arguments as gemm's. Grid (N tiles * M, SPLIT_K), M fastest: a row's weights are the next's."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tile % M
    n = (tile // M) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = dot_row(
        x + row * K,
        None,
        words,
        scales,
        n,
        K,
        padded_out,
        k_tiles,
        groups,
        split,
        CODE,
        SCALE,
        HAS_MINIMUM,
        BITS,
        GROUP,
        EVEN_K,
        BLOCK_N,
        SPLIT_K,
    )
    finish(
        acc[None, :],
        y,
        bias,
        partials,
        locks,
        row + tl.arange(0, 1),
        n,
        M,
        N,
        tile,
        split,
        SPLIT_K,
        HAS_BIAS,
    )
