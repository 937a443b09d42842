"""Triton: y [pairs, N] = x W[expert of the pair]^T, for the weights of weight.py.

    grouped_gemm    tiles of align.py, which have one expert each, on tensor cores; tiles that are not used end at once
    grouped_gemv    a pair a program, without alignment and without tensor cores

Row `pair` of y comes of row `pair // TOP_K` of x: the up product reads tokens (TOP_K experts each), the down product
what that wrote (TOP_K is 1).
"""

import triton
import triton.language as tl

from ..dequant_gemm.gemm import accumulate
from ..dequant_gemm.gemv import dot_row
from .dense import accumulate_dense, dot_row_dense
from .epilogue import finish


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_gemm(
    x,  # [rows, K] float16 or bfloat16, contiguous
    words,
    scales,
    perm,
    bias,  # ExpertWeight's
    y,
    pair_weights,  # float32 [pairs], None
    pairs,
    experts,
    num_tiles,  # Alignment's
    num_pairs,
    N,
    K,
    padded_out,
    k_tiles,
    groups,
    words_stride,
    scales_stride,  # from an expert to the next
    alpha,
    limit,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,  # see epilogue.py
    GATED: tl.constexpr,
    CODE: tl.constexpr,  # functions: see dequant_gemm/decode.py; None: dense
    SCALE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Grid (tiles, N tiles), tiles fastest: those of one expert read the same weights and run together."""
    tile, first = tl.program_id(0), tl.program_id(1) * BLOCK_N
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(experts + tile).to(tl.int64)
    pair = tl.load(pairs + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = pair < num_pairs
    rows = tl.where(live, pair // TOP_K, 0)
    n = first + tl.arange(0, BLOCK_N)
    own = words + expert * words_stride
    if CODE is None:
        acc = accumulate_dense(x, rows, live, own, n, N, K, EVEN_K, BLOCK_M, BLOCK_N, SWAP)
    else:
        acc = accumulate(
            x,
            rows,
            live,
            perm if perm is None else perm + expert * K,
            own,
            scales + expert * scales_stride,
            n,
            K,
            padded_out,
            k_tiles,
            groups,
            0,
            CODE,
            SCALE,
            HAS_MINIMUM,
            BITS,
            GROUP,
            EVEN_K,
            BLOCK_M,
            BLOCK_N,
            1,
            SWAP,
        )
    own_bias = bias if bias is None else bias + expert * N
    finish(
        acc,
        y,
        own_bias,
        pair_weights,
        pair,
        live,
        first,
        N,
        alpha,
        limit,
        ACTIVATION,
        GATED,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit
def grouped_gemv(
    x,
    words,
    scales,
    perm,
    bias,
    y,
    pair_weights,
    chosen,  # int32 [pairs]
    N,
    K,
    padded_out,
    k_tiles,
    groups,
    words_stride,
    scales_stride,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments as grouped_gemm's. Grid (pairs, N tiles)."""
    index, first = tl.program_id(0), tl.program_id(1) * BLOCK_N
    expert = tl.load(chosen + index).to(tl.int64)
    row = x + (index // TOP_K).to(tl.int64) * K
    n = first + tl.arange(0, BLOCK_N)
    own = words + expert * words_stride
    if CODE is None:
        acc = dot_row_dense(row, own, n, N, K, EVEN_K, BLOCK_N)
    else:
        acc = dot_row(
            row,
            perm if perm is None else perm + expert * K,
            own,
            scales + expert * scales_stride,
            n,
            K,
            padded_out,
            k_tiles,
            groups,
            0,
            CODE,
            SCALE,
            HAS_MINIMUM,
            BITS,
            GROUP,
            EVEN_K,
            BLOCK_N,
            1,
        )
    own_bias = bias if bias is None else bias + expert * N
    pair = index.to(tl.int64) + tl.arange(0, 1)
    finish(
        acc[None, :],
        y,
        own_bias,
        pair_weights,
        pair,
        pair >= 0,
        first,
        N,
        alpha,
        limit,
        ACTIVATION,
        GATED,
        1,
        BLOCK_N,
    )
