"""act(gate) * up, with quantization for the down product.

    gate_up [T, 2 I] = [ gate | up ] --> act(gate) * up [T, I] in 16 bits, or codes and a scale per token

In 16 bits a program takes a piece of a row, so that one token fills more than one multiprocessor. A scale per token
needs the whole row: there a program holds one in registers, and gate and up are still read only once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    CODES,
    FLOATS,
    bytes_of,
    empty_codes,
    native_fp8,
    need,
    need_rows,
    row_scale,
    to_code,
    warps,
)

ACTIVATIONS = ("silu", "gelu_tanh")
MAX_QUANTIZED_WIDTH = 32768  # a row in the registers of one program
PIECE = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    # x / 2 * (1 + tanh(u)) = x * sigmoid(2 u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
    return x * _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def _gated_kernel(
    gate_up_ptr,  # [T, 2 * WIDTH]
    out_ptr,  # [T, WIDTH]: 16 bits, or codes int8 or uint8
    scale_ptr,  # float32 [T]
    gate_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CODE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_at = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    y = _activate(gate, ACTIVATION) * up
    out = out_ptr + row * WIDTH + column
    if CODE == "none":
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        scale = row_scale(y, 0, CODE)
        tl.store(scale_ptr + row, scale)
        tl.store(out, to_code(y * (1.0 / scale), CODE, NATIVE_FP8), mask=inside)


def gated(
    gate_up: Tensor, activation: str, *, quantize: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """act(gate) * up. gate_up [T, 2 I] float16, bfloat16 or float32, gate in the first half of each row.

    activation: "silu" or "gelu_tanh". quantize: "none", "int8" or "fp8".
    Returns (out [T, I] in gate_up's dtype, None), or (codes int8 or float8_e4m3fn [T, I], scales float32 [T, 1]).
    Raises UnsupportedError naming the argument that does not fit.
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
    need(quantize in CODES, name, f"quantize is {quantize!r}, want one of {list(CODES)}")
    need(
        quantize == "none" or width <= MAX_QUANTIZED_WIDTH,
        name,
        f"rows of {width} numbers; at most {MAX_QUANTIZED_WIDTH} can be quantized in one program",
    )
    out, scales = empty_codes((rows, width), quantize, gate_up)
    if rows:
        block = triton.next_power_of_2(width)
        block = block if quantize != "none" else min(block, PIECE)
        _gated_kernel[(rows, triton.cdiv(width, block))](
            gate_up,
            bytes_of(out),
            scales,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=block,
            ACTIVATION=activation,
            CODE=quantize,
            NATIVE_FP8=native_fp8(gate_up),
            num_warps=warps(block),
        )
    return out, scales
