"""Functions of one number that the kernels of this room share, in float32."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself from 20 on, as torch's."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))
