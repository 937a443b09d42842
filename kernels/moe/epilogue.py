"""What is done to a tile of a grouped product before it is written: bias, activation, the weights of the experts."""

import triton
import triton.language as tl

from ..fused.activation import activate, sigmoid


@triton.jit
def gated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """activation(g) u; "clamped", GPT-OSS's: (u + 1) g sigmoid(alpha g), g up to the limit, u within it. NaN stays."""
    if ACTIVATION == "clamped":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = (up + 1.0) * (gate * sigmoid(gate * alpha))
    else:
        y = activate(gate, ACTIVATION) * up
    return y


@triton.jit
def finish(
    acc,  # float32 [BLOCK_M, BLOCK_N]
    y,  # [pairs, N], or [pairs, N / 2] of gate and up
    bias,  # [N], None
    pair_weights,  # float32 [pairs], None: what a row is multiplied by
    pair,  # int64 [BLOCK_M]: rows of y
    live,  # bool [BLOCK_M]
    first,  # output of acc's first column
    N,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,  # "": none; "clamped": with alpha and limit
    GATED: tl.constexpr,  # columns are gate and up in turns
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of a grouped product, in float32 until then."""
    n = first + tl.arange(0, BLOCK_N)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(acc.reshape(BLOCK_M, BLOCK_N // 2, 2))
        acc = gated(gate, up, alpha, limit, ACTIVATION)
        column, width = first // 2 + tl.arange(0, BLOCK_N // 2), N // 2
    else:
        column, width = n, N
        if ACTIVATION != "":
            acc = activate(acc, ACTIVATION)
    if pair_weights is not None:
        acc *= tl.load(pair_weights + pair, mask=live, other=0.0)[:, None]
    at = y + pair[:, None] * width + column[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & (column < width)[None, :])
