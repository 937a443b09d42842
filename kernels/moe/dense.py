"""The loops over K for experts in 16 bits, beside those for codes in kernels/dequant_gemm (gemm.py, gemv.py)."""

import triton
import triton.language as tl

from ..dequant_gemm.gemm import mma

STEP = tl.constexpr(64)  # features an iteration takes


@triton.jit
def accumulate_dense(
    x,  # [rows, K]
    rows,  # int64 [BLOCK_M]: which of them
    live,  # bool [BLOCK_M]
    weight,  # [N, K] like x
    n,  # [BLOCK_N]: outputs
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: the rows times the outputs' weights. SWAP: as y^T = W x^T."""
    feature = tl.arange(0, STEP)
    row = x + rows[:, None] * K
    output = weight + n[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, STEP):
        k = (first + feature)[None, :]
        of_x = live[:, None] if EVEN_K else live[:, None] & (k < K)
        of_weight = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)
        a = tl.load(row + k, mask=of_x, other=0.0)
        b = tl.load(output + k, mask=of_weight, other=0.0)
        left, right = (b, tl.trans(a)) if SWAP else (a, tl.trans(b))
        acc = mma(left, right, acc)
    return tl.trans(acc) if SWAP else acc


@triton.jit
def dot_row_dense(
    x,  # one row
    weight,
    n,
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_N]: one row times the outputs' weights, by FMA."""
    feature = tl.arange(0, STEP)
    output = weight + n[:, None].to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, STEP), tl.float32)
    for first in range(0, K, STEP):
        k = first + feature
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        inside = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)[None, :]
        acc += a[None, :] * tl.load(output + k[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(acc, 1)
