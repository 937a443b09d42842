"""Triton: FP8 activations times FP8 weights (W8A8), y [M, N] = x [M, K] W^T (+ bias), float32 sums.

Codes are e4m3 (arXiv 2209.05433), scales float32. Scales that hold for a whole row of x or of W multiply the finished
sum; scales of groups of features (DeepSeek-V3, arXiv 2412.19437, section 3.3) multiply the sum of their group. The FP8
tensor cores of cc 89 and 90 keep 13 bits of a sum's mantissa (arXiv 2411.10958), so there the sum of each tile of K, at
most 128 features, is added to a float32 accumulator outside them.
"""

import triton
import triton.language as tl

from ..dequant_gemm.split_k import finish
from ..fused.rows import row_scale
from .quantize import to_e4m3


@triton.jit
def _tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(m, n) of a tile's first row and column: GROUP_M tiles of rows, then the next columns, so that programs running
    together share rows and columns in L2. With few rows M is fastest: who reads the same weights runs together."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    wave = tile // (GROUP_M * n_tiles)
    height = tl.minimum(m_tiles - wave * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * n_tiles)
    return (wave * GROUP_M + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def gemm(
    x,  # [M, K] e4m3, or 16 bits where the product quantizes
    x_scales,  # float32: row m, group g at m * x_scale_row + g * x_scale_group
    weight,  # [N, weight_stride] e4m3, columns from K on are 0
    w_scales,  # float32 [blocks of rows, blocks of columns] or [N]
    bias,  # [N] like y
    y,  # [M, N] float16 or bfloat16
    partials,  # float32 [SPLIT_K, M, N]
    locks,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    w_scale_stride,
    x_scale_row,
    x_scale_group,
    k_tiles,
    QUANTIZE: tl.constexpr,  # x is quantized here: "no", "group" (a scale per row and tile of K) or "static"
    X_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr,
    W_GROUP: tl.constexpr,  # features (0: all) and rows to a scale
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y. SWAP computes y^T = W x^T: few rows then need no padding to the 64 that a warp-group MMA has."""
    ONE_BLOCK: tl.constexpr = W_ROWS % BLOCK_N == 0  # the tile's rows of W share their scales
    SCALE_X: tl.constexpr = QUANTIZE == "group" or X_GROUP > 0 or (W_GROUP > 0 and ONE_BLOCK)
    POLICY: tl.constexpr = (
        "evict_first" if BLOCK_M <= 64 else ""
    )  # weights that hardly anyone reads again
    tile, split = tl.program_id(0), tl.program_id(1)
    first_m, first_n = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row, column = (
        tl.minimum(m, M - 1),
        tl.minimum(n, N - 1),
    )  # scales and weights past the end: any, never written
    live = (m < M)[
        :, None
    ]  # rows past the end are not read: a tile of one row would read it sixteen times
    x_at = x + row[:, None].to(tl.int64) * x_stride + k[None, :]
    w_at = weight + column[:, None].to(tl.int64) * weight_stride + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k_tile in range(split, k_tiles, SPLIT_K):
        first = k_tile * BLOCK_K
        a = tl.load(
            x_at + first, mask=live if EVEN_K else live & (first + k < K)[None, :], other=0.0
        )
        b = tl.load(w_at + first, eviction_policy=POLICY)
        x_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
        w_scale = tl.full((BLOCK_N,), 1.0, tl.float32)
        if QUANTIZE == "group":
            value = a.to(tl.float32)
            x_scale = row_scale(value, 1, "fp8")
            a = to_e4m3(value * (1.0 / x_scale)[:, None], NATIVE_FP8)
        elif QUANTIZE == "static":
            a = to_e4m3(a.to(tl.float32) * (1.0 / tl.load(x_scales)), NATIVE_FP8)
        elif X_GROUP:
            x_scale = tl.load(x_scales + row * x_scale_row + first // X_GROUP * x_scale_group)
        if W_GROUP and ONE_BLOCK:
            x_scale *= tl.load(w_scales + first // W_GROUP + first_n // W_ROWS * w_scale_stride)
        elif W_GROUP:
            w_scale = tl.load(w_scales + first // W_GROUP + column // W_ROWS * w_scale_stride)
        acc = _add_tile(
            acc, a, b, x_scale, w_scale, SCALE_X, W_GROUP and not ONE_BLOCK, SWAP, PROMOTE
        )
    if SWAP:
        acc = tl.trans(acc)
    if QUANTIZE != "group" and not X_GROUP:
        acc *= tl.load(x_scales + row * x_scale_row)[:, None]
    if not W_GROUP:
        acc *= tl.load(w_scales + column)[None, :]
    finish(acc, y, bias, partials, locks, m, n, M, N, tile, split, SPLIT_K, HAS_BIAS)


@triton.jit
def _add_tile(
    acc,
    a,
    b,
    x_scale,
    w_scale,
    SCALE_X: tl.constexpr,
    SCALE_W: tl.constexpr,
    SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """acc + a b^T, times the scales of this tile of K: of each row of a, of each row of b."""
    left, right = (b, tl.trans(a)) if SWAP else (a, tl.trans(b))
    if SCALE_X or SCALE_W or PROMOTE:
        # The limit is what keeps the compiler from adding into acc on the tensor cores after all.
        tile_acc = tl.dot(left, right, max_num_imprecise_acc=a.shape[1])
        if SCALE_X:
            tile_acc *= x_scale[None, :] if SWAP else x_scale[:, None]
        if SCALE_W:
            tile_acc *= w_scale[:, None] if SWAP else w_scale[None, :]
        acc += tile_acc
    else:
        acc = tl.dot(left, right, acc)
    return acc
