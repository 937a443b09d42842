"""GEMM: y [M, N] = x [M, K] W^T (+ bias) on tensor cores, for whatever `decode.py` makes numbers of.

Codes minus their zero point enter the tensor cores exactly; the scale multiplies the float32 sum of its group, and a
minimum the sum of the group's activations.
"""

import triton
import triton.language as tl

from .decode import INTERPRETED, planes_per_group
from .split_k import finish


@triton.jit
def mma(a, b, acc):
    """acc + a b; the interpreter has no bfloat16 products."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def accumulate(
    x,  # [rows, K] float16 or bfloat16, contiguous
    rows,  # int64 [BLOCK_M]: which of them
    live,  # bool [BLOCK_M]: the others are no rows
    perm,  # int32 [K]: which feature of x column j of the codes is; None: j
    words,
    scales,  # ShuffledWeight's
    n,  # [BLOCK_N]: outputs
    K,
    padded_out,
    k_tiles,
    groups,
    split,
    CODE: tl.constexpr,  # functions: see decode.py
    SCALE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # features, 0: all
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: the rows times the outputs' weights, over every SPLIT_K-th tile of K from `split` on.

    An iteration takes one tile of K. SWAP computes y^T = W x^T: on cc 90 the decoded weight is then the operand that
    a warp-group MMA takes from registers, and few rows need no padding to 64."""
    PLANES: tl.constexpr = 16 // BITS
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    PER_GROUP: tl.constexpr = planes_per_group(PLANES, GROUP)
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    weight_at = words + n[:, None] * 16 + tl.arange(0, 16)[None, :]
    feature = tl.arange(0, 32)
    row = x + rows[:, None] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k_tile in range(split, k_tiles, SPLIT_K):
        packed = tl.load(weight_at + k_tile * padded_out * 16, eviction_policy="evict_first")
        packed = (
            packed.reshape(BLOCK_N, 4, 4).permute(2, 1, 0).reshape(16, BLOCK_N)
        )  # rows in a plane's order
        group_acc = tl.zeros_like(acc)
        for plane in tl.static_range(PLANES):
            first = k_tile * (32 * PLANES) + plane * 32
            k = first + feature
            inside = live[:, None] if EVEN_K else live[:, None] & (k[None, :] < K)
            if perm is not None:
                k = tl.load(perm + k, mask=k < K, other=0)
            a = tl.load(row + k[None, :], mask=inside, other=0.0)
            for half in tl.static_range(HALVES):
                if plane % PER_GROUP == 0:
                    group = 0 if GROUP == 0 else (first + 16 * half) // GROUP
                    scale, zero, minimum = SCALE(scales, group, n, groups, padded_out, BITS)
                    group_acc = tl.zeros_like(acc)
                    row_sum = tl.zeros((BLOCK_M,), tl.float32)
                used = (
                    a
                    if HALVES == 1
                    else tl.where((feature // 16 == half)[None, :], a, 0.0).to(a.dtype)
                )
                if HAS_MINIMUM:
                    row_sum += tl.sum(used.to(tl.float32), 1)
                even, odd = CODE(packed, zero[None, :], plane, BITS, BF16)
                b = tl.join(even, odd).permute(0, 2, 1).reshape(32, BLOCK_N)
                left, right = (tl.trans(b), tl.trans(used)) if SWAP else (used, b)
                group_acc = mma(left, right, group_acc)
                if (plane + 1) % PER_GROUP == 0:
                    if SWAP:
                        acc += group_acc * scale[:, None]
                        if HAS_MINIMUM:
                            acc += minimum[:, None] * row_sum[None, :]
                    else:
                        acc += group_acc * scale[None, :]
                        if HAS_MINIMUM:
                            acc += row_sum[:, None] * minimum[None, :]
    return tl.trans(acc) if SWAP else acc


@triton.jit
def gemm(
    x,  # [M, K] float16 or bfloat16, contiguous
    words,
    scales,  # ShuffledWeight's
    bias,  # [N] like x
    y,  # [M, N] like x
    partials,  # float32 [SPLIT_K, M, N]
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Constants as accumulate's. Grid (M tiles * N tiles, SPLIT_K), M fastest: the tiles that read the same weights run
    together."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    m = (tile % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // m_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = accumulate(
        x,
        m.to(tl.int64),
        m < M,
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
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
        SWAP,
    )
    finish(acc, y, bias, partials, locks, m, n, M, N, tile, split, SPLIT_K, HAS_BIAS)
