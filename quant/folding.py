"""Fold AWQ's scales into a decoder block, which computes the same function before and after.

For each fold of the layer map: find the scales by `algorithms.awq`, judged on the output of the module the map names,
then divide the source and multiply the consumers in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms import awq
from .layer_map import Fold, LayerMap

Grid = tuple[int, int, bool]  # bits, group_size, symmetric


@torch.no_grad()
def fold_block(block: nn.Module, layer_map: LayerMap, mean_abs: dict[str, Tensor], hidden: Tensor,
               kwargs: dict[str, Any], grids: dict[str, Grid], dtype: torch.dtype) -> dict[str, float]:
    """Scale a block in place. grids: of each linear that will be quantized; dtype: what norms are stored in.

    mean_abs: E|x| [in] of the inputs of each fold's first consumer. hidden [n, T, hidden]: inputs of the block that are
    replayed to judge scales, with the block's other arguments; as a search has one free number, few suffice.
    Returns, per fold source, the loss with scales relative to the loss without.
    """
    gains = {}
    folds = [fold for fold in layer_map.folds if fold.consumers[0] in grids]
    calls = record_calls(block, {fold.inspect for fold in folds}, hidden, kwargs)
    for fold in folds:
        linears = [block.get_submodule(name) for name in fold.consumers]
        grid = grids[fold.consumers[0]]
        # No linear consumes two folds, so what was recorded before any of them still fits its unscaled weight.
        loss = _replay_loss(block.get_submodule(fold.inspect), calls[fold.inspect], linears, grid)
        found = _search(block, fold, linears, mean_abs[fold.consumers[0]], loss, grid[1])
        scales = _divide_source(block, fold, found.scales, layer_map.norm_offset, dtype)
        for linear in linears:
            linear.weight.mul_(scales)
        gains[fold.source] = found.loss / max(found.identity_loss, 1e-30)
    return gains


def record_calls(block: nn.Module, names: set[str], hidden: Tensor,
                 kwargs: dict[str, Any]) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """The arguments with which a block calls some of its submodules."""
    calls: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)
        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True) for n in names]
    block(hidden, **kwargs)
    for handle in handles:
        handle.remove()
    return calls


def _search(block: nn.Module, fold: Fold, linears: list[nn.Linear], mean_abs: Tensor,
            loss: Callable[[Tensor], float], group_size: int) -> awq.Search:
    weight_mean = awq.relative_magnitude([linear.weight for linear in linears], group_size)
    if fold.kind != "heads":
        return awq.search_scales(mean_abs, weight_mean, loss)
    head_dim = block.self_attn.head_dim
    kv_heads = block.get_submodule(fold.source).out_features // head_dim
    query_heads = len(mean_abs) // head_dim
    return awq.search_scales(awq.share_over_heads(mean_abs, kv_heads, head_dim),
                             awq.share_over_heads(weight_mean, kv_heads, head_dim),
                             lambda scales: loss(awq.repeat_over_heads(scales, query_heads, head_dim)))


def _divide_source(block: nn.Module, fold: Fold, scales: Tensor, norm_offset: float, dtype: torch.dtype) -> Tensor:
    """Divide what produces the consumers' inputs; returns the scales [in] their columns must be multiplied by."""
    source = block.get_submodule(fold.source)
    if fold.kind == "norm":
        stored, scales = awq.divide_norm(source.weight, scales, norm_offset, dtype)
        source.weight.copy_(stored)
        return scales
    source.weight.div_(scales.unsqueeze(1))
    if source.bias is not None:
        source.bias.div_(scales)
    if fold.kind == "heads":
        head_dim = block.self_attn.head_dim
        query_heads = block.get_submodule(fold.consumers[0]).in_features // head_dim
        return awq.repeat_over_heads(scales, query_heads, head_dim)
    return scales


def _replay_loss(module: nn.Module, call: tuple[tuple, dict[str, Any]], linears: list[nn.Linear],
                 grid: Grid) -> Callable[[Tensor], float]:
    """Squared error of a module's output on recorded arguments when its linears' weights are rounded."""
    args, kwargs = call
    originals = [linear.weight.clone() for linear in linears]
    reference = _first(module(*args, **kwargs))

    def loss(scales: Tensor) -> float:
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.copy_(awq.scaled_round_trip(weight, scales, *grid))
        error = (_first(module(*args, **kwargs)) - reference).square().mean().item()
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.copy_(weight)
        return error

    return loss


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
