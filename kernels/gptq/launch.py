"""Checked launches of the kernels in products.py. Importing this imports Triton."""

import torch
import triton
from torch import Tensor

from . import products
from .layout import ShuffledWeight
from .tuning import Table, Tile, split_k


def _constants(weight: ShuffledWeight) -> dict:
    return {
        "BITS": weight.bits,
        "FP8": weight.fp8,
        "GROUP": weight.group,
        "MINS": weight.packed_scale is None and not weight.fp8,
        "BF16_SCALE": weight.packed_scale == torch.bfloat16,
    }


def _check(x: Tensor, weight: ShuffledWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(
            f"activations {tuple(x.shape)} must be contiguous rows of {weight.in_features} features"
        )
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations must be float16 or bfloat16, not {x.dtype}")
    if x.device != weight.words.device:
        raise ValueError(f"activations are on {x.device}, the weight on {weight.words.device}")


def gemv(
    x: Tensor, weight: ShuffledWeight, bias: Tensor | None, table: Table, processors: int
) -> Tensor:
    """x [M <= 8, K] -> [M, N], without tensor cores."""
    _check(x, weight)
    programs = triton.cdiv(weight.out_features, table.gemv_block_n) * x.shape[0]
    parts = split_k(programs, weight.words.shape[0], processors, table.gemv_programs)
    return _launch(
        products.gemv,
        x,
        weight,
        bias,
        programs,
        parts,
        warps=table.gemv_warps,
        stages=1,
        BLOCK_N=table.gemv_block_n,
    )


def gemm(
    x: Tensor, weight: ShuffledWeight, bias: Tensor | None, tile: Tile, processors: int
) -> Tensor:
    """x [M, K] -> [M, N] on tensor cores; M <= 512."""
    _check(x, weight)
    programs = triton.cdiv(x.shape[0], tile.block_m) * triton.cdiv(
        weight.out_features, tile.block_n
    )
    parts = split_k(programs, weight.words.shape[0], processors, tile.programs)
    if parts > 1 and programs > weight.locks.numel():
        parts = 1
    return _launch(
        products.gemm,
        x,
        weight,
        bias,
        programs,
        parts,
        warps=tile.warps,
        stages=tile.stages,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SWAP=tile.swap,
    )


def _launch(
    kernel,
    x: Tensor,
    weight: ShuffledWeight,
    bias: Tensor | None,
    programs: int,
    parts: int,
    *,
    warps: int,
    stages: int,
    **constants,
) -> Tensor:
    rows, inner = x.shape
    tiles, padded, _ = weight.words.shape
    y = x.new_empty(rows, weight.out_features)
    partials = (
        x.new_empty((parts, rows, weight.out_features), dtype=torch.float32) if parts > 1 else y
    )
    groups = weight.scales.shape[-2]
    kernel[(programs, parts)](
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
        padded,
        tiles,
        groups,
        HAS_BIAS=bias is not None,
        EVEN_K=inner % weight.tile_features == 0,
        SPLIT_K=parts,
        **_constants(weight),
        **constants,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def dequantize(weight: ShuffledWeight, dtype: torch.dtype) -> Tensor:
    """The dense [N, K] weight, columns in the weight's own (permuted) order."""
    tiles, padded, _ = weight.words.shape
    dense = torch.empty(
        weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device
    )
    products.dequantize[(padded // 64, tiles)](
        weight.words,
        weight.scales,
        dense,
        weight.out_features,
        weight.in_features,
        padded,
        weight.scales.shape[-2],
        **_constants(weight),
        BLOCK_N=64,
        num_warps=4,
    )
    return dense
