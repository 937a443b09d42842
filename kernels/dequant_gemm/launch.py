"""Checked launches of GEMM, GEMV and dequantization. Importing this imports Triton."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..errors import KernelArgumentError
from .dequantize import dequantize as dequantize_kernel
from .gemm import gemm as gemm_kernel
from .gemv import gemv as gemv_kernel
from .layout import ShuffledWeight
from .tiles import Table, Tile, split_k


def _constants(weight: ShuffledWeight) -> dict[str, Any]:
    return {
        "CODE": weight.decode.code,
        "SCALE": weight.decode.scale,
        "BITS": weight.bits,
        "GROUP": weight.group,
    }


def _check(x: Tensor, weight: ShuffledWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise KernelArgumentError(
            f"activations {tuple(x.shape)} must be contiguous rows of {weight.in_features} features"
        )
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise KernelArgumentError(f"activations must be float16 or bfloat16, not {x.dtype}")
    if x.device != weight.words.device:
        raise KernelArgumentError(
            f"activations are on {x.device}, the weight on {weight.words.device}"
        )


def gemv(
    x: Tensor, weight: ShuffledWeight, bias: Tensor | None, table: Table, num_sms: int
) -> Tensor:
    """x [M <= 8, K] -> [M, N], without tensor cores."""
    _check(x, weight)
    programs = triton.cdiv(weight.out_features, table.gemv_block_n) * x.shape[0]
    splits = split_k(programs, weight.words.shape[0], num_sms, table.gemv_splits_per_sm)
    return _launch(
        gemv_kernel,
        x,
        weight,
        bias,
        programs,
        splits,
        warps=table.gemv_warps,
        stages=1,
        BLOCK_N=table.gemv_block_n,
    )


def gemm(
    x: Tensor, weight: ShuffledWeight, bias: Tensor | None, tile: Tile, num_sms: int
) -> Tensor:
    """x [M, K] -> [M, N] on tensor cores; M <= 512."""
    _check(x, weight)
    programs = triton.cdiv(x.shape[0], tile.block_m) * triton.cdiv(
        weight.out_features, tile.block_n
    )
    splits = split_k(programs, weight.words.shape[0], num_sms, tile.splits_per_sm)
    if splits > 1 and programs > weight.locks.numel():
        splits = 1
    return _launch(
        gemm_kernel,
        x,
        weight,
        bias,
        programs,
        splits,
        warps=tile.warps,
        stages=tile.stages,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SWAP=tile.swap,
    )


def _launch(
    kernel: Any,  # the @triton.jit function
    x: Tensor,
    weight: ShuffledWeight,
    bias: Tensor | None,
    programs: int,
    splits: int,
    *,
    warps: int,
    stages: int,
    **constants: int | bool,
) -> Tensor:
    rows, inner = x.shape
    k_tiles, padded_out, _ = weight.words.shape
    y = x.new_empty(rows, weight.out_features)
    partials = (
        x.new_empty((splits, rows, weight.out_features), dtype=torch.float32) if splits > 1 else y
    )
    groups = weight.scales.shape[-2]
    kernel[(programs, splits)](
        x,
        weight.words,
        weight.scales,
        bias,
        y,
        partials,
        weight.locks,
        rows,
        weight.out_features,
        inner,
        padded_out,
        k_tiles,
        groups,
        HAS_MINIMUM=weight.decode.has_minimum,
        HAS_BIAS=bias is not None,
        EVEN_K=inner % weight.tile_features == 0,
        SPLIT_K=splits,
        **_constants(weight),
        **constants,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def dequantize(weight: ShuffledWeight, dtype: torch.dtype) -> Tensor:
    """The dense [N, K] weight, columns in the weight's own (permuted) order."""
    k_tiles, padded_out, _ = weight.words.shape
    dense = torch.empty(
        weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device
    )
    dequantize_kernel[(padded_out // 64, k_tiles)](
        weight.words,
        weight.scales,
        dense,
        weight.out_features,
        weight.in_features,
        padded_out,
        weight.scales.shape[-2],
        **_constants(weight),
        BLOCK_N=64,
        num_warps=4,
    )
    return dense
