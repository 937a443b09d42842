"""act(gate) * up.

    gate_up [T, 2 I] = [ gate | up ] --> act(gate) * up [T, I]

A program takes a piece of a row, so that one token fills more than one multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import FLOATS, need, need_rows, warps

ACTIVATIONS = ("silu", "gelu_tanh", "relu2")
PIECE = 1024


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "relu2":
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays
        y = y * y
    else:
        # x / 2 * (1 + tanh(u)) = x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
        y = x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return y


@triton.jit
def _gated_kernel(
    gate_up_ptr,  # [T, 2 * WIDTH]
    out_ptr,  # [T, WIDTH]
    gate_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_at = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up. gate_up [T, 2 I] float16, bfloat16 or float32, gate in the first half of each row.

    activation: "silu", "gelu_tanh" or "relu2", relu(x)^2. Returns [T, I] in gate_up's dtype.
    Raises KernelArgumentError naming the argument that does not fit.
    """
    name = "gated"
    need_rows(name, "gate_up", gate_up, FLOATS, None, None)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    need(
        width > 0 and gate_up.shape[1] == 2 * width,
        name,
        f"gate_up has {gate_up.shape[1]} columns, not 2 halves",
    )
    need(
        activation in ACTIVATIONS,
        name,
        f"activation is {activation!r}, want one of {list(ACTIVATIONS)}",
    )
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(triton.next_power_of_2(width), PIECE)
        _gated_kernel[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=block,
            ACTIVATION=activation,
            num_warps=warps(block),
        )
    return out
