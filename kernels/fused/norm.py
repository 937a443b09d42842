"""RMSNorm with the residual addition before it.

    x [T, H] --(post norm: Gemma)--> * scale --> + residual [T, H], written back --> norm * (offset + weight)

One program a row; the row stays in registers: x and the residual are read once, the sum and the output written once.
The norm is that of the sum as it is kept, in the residual's dtype. Zhang and Sennrich 2019, arXiv 1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import FLOATS, need, need_rows, warps

MAX_WIDTH = 32768  # a row in the registers of one program


@triton.jit
def _normalized(x, weight, eps, WIDTH: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, WIDTH]
    residual_ptr,  # [T, WIDTH], read and written; None: nothing is added
    weight_ptr,  # [WIDTH]
    post_weight_ptr,  # [WIDTH]: norm of x before it is added; None: no such norm
    out_ptr,  # [T, WIDTH]
    x_stride,
    residual_stride,
    eps,
    post_eps,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if post_weight_ptr is not None:
        post_weight = (
            tl.load(post_weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
        )
        x = _normalized(x, post_weight, post_eps, WIDTH)
    if residual_ptr is not None:
        residual = residual_ptr + row * residual_stride + column
        x = x * scale + tl.load(residual, mask=inside, other=0.0).to(tl.float32)
        kept = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual, kept, mask=inside)
        x = kept.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    y = _normalized(x, weight, eps, WIDTH)
    tl.store(out_ptr + row * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    offset: float = 0.0,
    post_weight: Tensor | None = None,
    post_eps: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """RMSNorm of x, or of residual + scale * x, over the last axis.

    x [T, H] float16, bfloat16 or float32, its rows contiguous. weight [H]; the factor is offset + weight (Gemma stores
    w and means 1 + w). residual [T, H]: becomes residual + scale * x. post_weight [H]: x is normalized with it first,
    with post_eps (None: eps).

    Returns [T, H] in x's dtype. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "rms_norm"
    need_rows(name, "x", x, FLOATS, None, None)
    rows, width = x.shape
    need(
        0 < width <= MAX_WIDTH,
        name,
        f"rows of {width} numbers; at most {MAX_WIDTH} fit one program",
    )
    need_rows(name, "weight", weight, FLOATS, width)
    if residual is not None:
        need_rows(name, "residual", residual, FLOATS, rows, width)
    else:
        need(scale == 1.0, name, "scale is given without a residual")
    if post_weight is not None:
        need(residual is not None, name, "post_weight is given without a residual")
        need_rows(name, "post_weight", post_weight, FLOATS, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            post_weight,
            out,
            x.stride(0),
            residual.stride(0) if residual is not None else 0,
            eps,
            eps if post_eps is None else post_eps,
            scale,
            WIDTH=width,
            BLOCK=block,
            OFFSET=offset,
            num_warps=warps(block),
        )
    return out
