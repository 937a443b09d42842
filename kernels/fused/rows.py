"""What the kernels of this room share: rows to 8-bit codes on the device, checks of arguments on the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelArgumentError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """max|x| in float32 along an axis; NaN where there is one. As integers, because tl.max drops NaN and the bits of
    magnitudes are ordered as they are, NaN above infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(x, axis: tl.constexpr, CODE: tl.constexpr):
    """The scale of a row: its largest magnitude is the largest code."""
    limit: tl.constexpr = 127.0 if CODE == "int8" else 448.0
    scale = largest_magnitude(x, axis) / limit
    return tl.where(scale < 7.888609052210118e-31, 7.888609052210118e-31, scale)  # NaN stays


@triton.jit
def to_code(x, CODE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """float32, already divided by its scale, to int8, or to the bits of e4m3 as uint8; nearest, ties to even."""
    if CODE == "int8":
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        code = ((x + 12582912.0) - 12582912.0).to(
            tl.int8
        )  # 1.5 * 2**23: its unit in the last place is 1
    elif NATIVE_FP8:
        code = tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = _e4m3_bits(tl.minimum(tl.maximum(x, -448.0), 448.0))
    return code


@triton.jit
def _e4m3_bits(x):
    """float32 within +-448 to e4m3 in integer operations, for cards that cannot (and for the interpreter)."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (
        120 << 3
    )  # bias 127 to bias 7
    steps = (
        magnitude.to(tl.float32, bitcast=True) + 16384.0
    )  # below 2**-6 codes count steps of 2**-9
    subnormal = steps.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


def native_fp8(x: Tensor) -> bool:
    """Whether the card converts to e4m3 itself (Ada and later)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def bytes_of(codes: Tensor | None) -> Tensor | None:
    """FP8 codes as the uint8 that the kernels write; anything else as it is."""
    return (
        codes.view(torch.uint8)
        if codes is not None and codes.dtype == torch.float8_e4m3fn
        else codes
    )


def need(ok: bool, kernel: str, problem: str) -> None:
    """Raise KernelArgumentError naming the kernel where an argument is not what it takes."""
    if not ok:
        raise KernelArgumentError(f"{kernel}: {problem}")


def need_rows(
    kernel: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], *shape: int | None
) -> None:
    """x has this many axes, these sizes (None: any), one of these dtypes, and its last axis lies side by side."""
    fits = x.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, x.shape, strict=True)
    )
    need(
        fits,
        kernel,
        f"{name} has shape {list(x.shape)}, want {['any' if n is None else n for n in shape]}",
    )
    need(x.dtype in dtypes, kernel, f"{name} is {x.dtype}, want {' or '.join(map(str, dtypes))}")
    need(
        x.shape[-1] <= 1 or x.stride(-1) == 1, kernel, f"the last axis of {name} is not contiguous"
    )


def warps(block: int) -> int:
    """Warps for a program that holds `block` numbers: about 16 a thread, up to 16 warps."""
    return min(16, max(1, block // 512))
