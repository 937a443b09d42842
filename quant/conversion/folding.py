"""Fold AWQ's scales into a decoder block, which computes the same function before and after.

For each fold of the layer (architectures/base.py): find the scales by `algorithms.awq`, judged by the error that GPTQ
will leave in the consumers, then divide the source and multiply the consumers in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...architectures.base import Fold
from ..algorithms import awq, gptq
from .blocks import linear
from .calibration import InputStatistics

Grid = tuple[int, int, bool]  # bits, group_size, symmetric
SEARCHED = 32  # linears that share scales are judged by so many of them, about


@torch.no_grad()
def fold_block(
    block: nn.Module,
    folds: Sequence[Fold],
    inputs: dict[str, InputStatistics],
    grids: dict[str, Grid],
    dtype: torch.dtype,
    norm_offset: float = 0.0,
) -> dict[str, float]:
    """Scale a block in place. grids: of each linear that will be quantized; dtype: what norms are stored in;
    norm_offset: norms multiply by weight + this.

    inputs: of what each fold says that it reads, before any fold. No linear consumes two folds, and what is folded into
    a linear scales its rows alone, so they fit until the linear's own fold.
    Returns, per fold source, the loss with scales relative to the loss without.
    """
    gains = {}
    for fold in folds:
        if fold.consumers[0] in grids:
            linears = [linear(block, name) for name in fold.consumers]
            found = _search(block, fold, linears, inputs[fold.reads], grids[fold.consumers[0]])
            scales = _divide_source(block, fold, found.scales, norm_offset, dtype)
            for consumer in (*fold.consumers, *fold.dense):
                block.get_parameter(f"{consumer}.weight").mul_(scales)
            gains[fold.source] = found.loss / max(found.identity_loss, 1e-30)
    return gains


def _search(
    block: nn.Module, fold: Fold, linears: list[nn.Linear], inputs: InputStatistics, grid: Grid
) -> awq.Search:
    # of many experts some: a copy of all would be as large as the block; an odd step, for gates and ups alike
    some = linears[:: -(-len(linears) // SEARCHED) | 1]
    weights: list[Tensor] = [consumer.weight for consumer in some]
    mean_abs, weight_mean = inputs.mean_abs, awq.relative_magnitude(weights, grid[1])
    loss = awq.expected_loss(torch.cat(weights), gptq.unexplained_variance(inputs.products), *grid)
    if fold.kind != "heads":
        return awq.search_scales(mean_abs, weight_mean, loss)
    head_dim, shared = _heads(block, fold)
    query_heads = len(mean_abs) // head_dim
    kv_heads = query_heads // shared
    return awq.search_scales(
        awq.share_over_heads(mean_abs, kv_heads, head_dim),
        awq.share_over_heads(weight_mean, kv_heads, head_dim),
        lambda scales: loss(awq.repeat_over_heads(scales, query_heads, head_dim)),
    )


def _divide_source(
    block: nn.Module, fold: Fold, scales: Tensor, norm_offset: float, dtype: torch.dtype
) -> Tensor:
    """Divide what produces the consumers' inputs; returns the scales [in] their columns must be multiplied by."""
    if fold.kind == "norm":
        weight = block.get_parameter(f"{fold.source}.weight")
        stored, scales = awq.divide_norm(weight, scales, norm_offset, dtype)
        weight.copy_(stored)
        return scales
    source = linear(block, fold.source)
    divisors = scales.sqrt() if fold.kind == "roots" else scales
    rows = fold.rows or ((source.out_features - len(scales), source.out_features),)
    parts = divisors.split([end - start for start, end in rows])
    for (start, end), part in zip(rows, parts, strict=True):
        source.weight[start:end].div_(part.unsqueeze(1))
        if source.bias is not None:
            source.bias[start:end].div_(part)
    if fold.kind == "heads":
        head_dim, _ = _heads(block, fold)
        query_heads = linear(block, fold.consumers[0]).in_features // head_dim
        return awq.repeat_over_heads(scales, query_heads, head_dim)
    return scales


def _heads(block: nn.Module, fold: Fold) -> tuple[int, int]:
    """head_dim, and how many query heads share a key-value head, of the attention of one of transformers' decoder
    blocks, which have it alone in common."""
    attention: Any = block.get_submodule(fold.source.rpartition(".")[0])
    return attention.head_dim, attention.num_key_value_groups
