"""What a recurrence gives, normed and gated, in one launch.

    x [T, groups * width] float32 --> norm of each group * weight, times silu(gate)     (gated delta rule: a head)
                                  or  norm of each group of x * silu(gate), * weight    (Mamba-2: heads of one B and C)

One program a row and group. Zhang and Sennrich 2019, arXiv 1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import FLOATS, need, need_rows, warps
from .elementwise import silu

MAX_WIDTH = 32768  # a group in the registers of one program


@triton.jit
def gated_norm_kernel(
    x_ptr,  # float32 [T, GROUPS * WIDTH]
    gate_ptr,  # [T, GROUPS * WIDTH]
    weight_ptr,  # float32 [WIDTH], or [GROUPS * WIDTH]
    out_ptr,  # [T, GROUPS * WIDTH]
    gate_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,  # from group to group
    GATE_FIRST: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = group * WIDTH + column
    place = row * (tl.num_programs(1) * WIDTH) + at
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    gate = silu(tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32))
    weight = tl.load(weight_ptr + group * WEIGHT_STRIDE + column, mask=inside, other=0.0)
    if GATE_FIRST:
        x *= gate
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight
    if GATE_FIRST == 0:
        y *= gate
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, num_groups: int, gate_first: bool
) -> Tensor:
    """x float32 [T, num_groups * W], contiguous. gate of the same shape, of 16 bits or float32, rows contiguous. weight
    float32 [W], the same for all groups, or [num_groups * W]. gate_first: the product is normed.

    Returns x's shape in gate's dtype. Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "gated_norm"
    need_rows(name, "x", x, (torch.float32,), None, None)
    need(x.is_contiguous(), name, "the rows of x are not contiguous")
    width = x.shape[1] // num_groups
    need(
        width * num_groups == x.shape[1] and 0 < width <= MAX_WIDTH,
        name,
        f"rows of {x.shape[1]} numbers in {num_groups} groups; at most {MAX_WIDTH} fit one program",
    )
    need_rows(name, "gate", gate, FLOATS, *x.shape)
    need_rows(name, "weight", weight, (torch.float32,), None)
    need(
        len(weight) in (width, x.shape[1]), name, f"weight has {len(weight)} numbers, want {width}"
    )
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    if len(x):
        block = triton.next_power_of_2(width)
        gated_norm_kernel[(len(x), num_groups)](
            x,
            gate,
            weight,
            out,
            gate.stride(0),
            eps,
            WIDTH=width,
            BLOCK=block,
            WEIGHT_STRIDE=width if len(weight) > width else 0,
            GATE_FIRST=gate_first,
            num_warps=warps(block),
        )
    return out
