"""Checked launches of quantization and the W8A8 product. Importing this imports Triton."""

import torch
import triton
from torch import Tensor

from ..dequant_gemm.tiles import split_k
from ..errors import KernelArgumentError
from ..fused.rows import bytes_of, native_fp8, warps
from .gemm import gemm as gemm_kernel
from .layout import TILE_OUT, Fp8Weight
from .quantize import quantize as quantize_kernel
from .tiles import Tile

GROUP_M = 8  # tiles of rows whose columns are computed together
CHUNK = 2048  # features a program quantizes where no scale spans the row


def quantize(x: Tensor, group: int, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows x [M, K] of 16 bits -> (e4m3 codes [M, K], float32 scales [M, groups]), one launch.

    A scale per row and `group` features (0: the row), the largest magnitude being code 448; or `static`, float32 [1],
    for all. The scales of a group lie together in memory, as the product's programs read them.
    """
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    count = -(-width // group) if group else 1
    scales = (
        static
        if static is not None
        else torch.empty(count, rows, dtype=torch.float32, device=x.device)
    )
    block = CHUNK if static is not None else group or triton.next_power_of_2(width)
    together = max(1, CHUNK // block)
    programs = triton.cdiv(width, block * together)
    quantize_kernel[(rows, programs)](
        x,
        bytes_of(codes),
        scales,
        x.stride(0),
        rows,
        width,
        count,
        GROUP=block,
        GROUPS=together,
        STATIC=static is not None,
        NATIVE_FP8=native_fp8(x),
        num_warps=warps(block * together),
    )
    return codes, static.expand(rows, 1) if static is not None else scales.t()


def gemm(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Fp8Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    promote: bool,
    num_sms: int,
) -> Tensor:
    """x [M, K] -> y [M, N] in `dtype`. x is e4m3 with x_scales float32 [M, groups], or of 16 bits with None: then the
    product quantizes what it reads, a scale per row and tile of K, or the weight's static scale."""
    rows = x.shape[0]
    _check(x, x_scales, weight)
    step, block_n = min(tile.block_k, weight.step), tile_width(tile, weight)
    k_tiles = triton.cdiv(weight.in_features, step)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(weight.out_features, block_n)
    # Many rows have many partial sums to write and read: one program on each multiprocessor is enough there.
    splits = split_k(programs, k_tiles, num_sms if tile.block_m <= 32 else num_sms // 2)
    if programs > weight.locks.numel():
        splits = 1
    y = torch.empty(rows, weight.out_features, dtype=dtype, device=x.device)
    partials = y.new_empty((splits, *y.shape), dtype=torch.float32) if splits > 1 else y
    own = "no" if x_scales is not None else "static" if weight.input_scale is not None else "group"
    scales = (
        x_scales
        if x_scales is not None
        else weight.input_scale
        if own == "static"
        else weight.scales
    )
    by_row, by_group = x_scales.stride() if x_scales is not None else (0, 0)
    gemm_kernel[(programs, splits)](
        x,
        scales,
        weight.codes,
        weight.scales,
        bias,
        y,
        partials,
        weight.locks,
        rows,
        weight.out_features,
        weight.in_features,
        x.stride(0),
        weight.codes.stride(0),
        weight.scales.stride(0),
        by_row,
        by_group,
        k_tiles,
        QUANTIZE=own,
        X_GROUP=weight.x_group if x_scales is not None and x_scales.shape[1] > 1 else 0,
        W_ROWS=weight.block_rows,
        W_GROUP=weight.group,
        HAS_BIAS=bias is not None,
        EVEN_K=weight.in_features % step == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=block_n,
        BLOCK_K=step,
        SPLIT_K=splits,
        SWAP=tile.swap,
        PROMOTE=promote,
        NATIVE_FP8=native_fp8(x),
        GROUP_M=GROUP_M,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def tile_width(tile: Tile, weight: Fp8Weight) -> int:
    """Outputs of a tile: the narrowest where outputs that do not share a scale would each need theirs in registers."""
    return tile.block_n if not weight.group or weight.block_rows % tile.block_n == 0 else TILE_OUT


def _check(x: Tensor, x_scales: Tensor | None, weight: Fp8Weight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features or x.stride(1) != 1:
        raise KernelArgumentError(
            f"activations {tuple(x.shape)} must be rows of {weight.in_features} contiguous features"
        )
    if x.device != weight.codes.device:
        raise KernelArgumentError(
            f"activations are on {x.device}, the weight on {weight.codes.device}"
        )
    if x_scales is None:
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise KernelArgumentError(
                f"activations must be float16, bfloat16, or e4m3 codes with their scales, not {x.dtype}"
            )
        return
    groups = -(-weight.in_features // weight.x_group) if weight.x_group else 1
    if x.dtype != torch.float8_e4m3fn or x_scales.dtype != torch.float32:
        raise KernelArgumentError(
            f"codes must be float8_e4m3fn and scales float32, not {x.dtype} and {x_scales.dtype}"
        )
    if (
        x_scales.dim() != 2
        or x_scales.shape[0] != x.shape[0]
        or x_scales.shape[1] not in (1, groups)
    ):
        raise KernelArgumentError(
            f"scales {tuple(x_scales.shape)} must be ({x.shape[0]}, 1), a scale per row, or "
            f"({x.shape[0]}, {groups}), one per {weight.x_group or weight.in_features} features"
        )
