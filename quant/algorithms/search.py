"""Importance-weighted range search: clip each group where that lowers the error the layer's output will feel.

For a linear layer with inputs x, moving weight (o, j) by d adds about d^2 E[x_j^2] to the output's squared error, so
E[x_j^2] (the diagonal of the Hessian) is the importance of column j. Each group tries shrunken ranges and keeps the
best; the winner's scale is then refitted in closed form to the codes it chose, and kept if the error falls.

The same idea: AutoAWQ's clip search (`awq/quantize/quantizer.py`), llama.cpp's imatrix, llm-compressor's imatrix_mse.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..weight import QuantizedWeight
from .rtn import encode, extent, full_range_grid, make_grid, round_scales, to_groups, to_weight

SHRINK_STEPS = 20
SHRINK_LEAST = 0.4
REFITS = 2
CHUNK = 1 << 19  # weights searched at a time, so that the many passes stay in cache


def fit_grid(
    groups: Tensor, importance: Tensor | None, bits: int, symmetric: bool, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """The best grid found for groups [out, n_groups, size] under importance [n_groups, size] (None: all equal)."""
    if importance is None:
        importance = torch.ones(groups.shape[1:], device=groups.device)
    rows = max(1, CHUNK // groups[0].numel())
    parts = [
        _fit_chunk(chunk, importance, bits, symmetric, min_zero)
        for chunk in torch.split(groups, rows)
    ]
    return torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts])


def quantize(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    min_zero: int = 0,
) -> QuantizedWeight:
    """Round a float32 weight [out, in] to the nearest point of searched grids; importance [in] or None."""
    groups = to_groups(weight.float(), group_size)
    per_group = None if importance is None else importance.float().reshape(groups.shape[1:])
    scales, zeros = fit_grid(groups, per_group, bits, symmetric, min_zero)
    return to_weight(encode(groups, scales, zeros, bits), scales, zeros, bits, symmetric)


def _fit_chunk(
    groups: Tensor, importance: Tensor, bits: int, symmetric: bool, min_zero: int
) -> tuple[Tensor, Tensor]:
    low, high = extent(groups)
    best_scales, best_zeros = make_grid(low, high, bits, symmetric, min_zero)
    codes, best_error = _try(groups, importance, best_scales, best_zeros, bits)
    for scales, zeros in _candidates(low, high, bits, symmetric, min_zero):
        _, error = _try(groups, importance, scales, zeros, bits)
        best_scales, best_zeros, best_error = _keep_better(
            (scales, zeros, error), (best_scales, best_zeros, best_error)
        )
    for _ in range(REFITS):
        codes = encode(groups, best_scales, best_zeros, bits)
        scales = _refit(groups, importance, codes - best_zeros.unsqueeze(-1), best_scales)
        _, error = _try(groups, importance, scales, best_zeros, bits)
        best_scales, best_zeros, best_error = _keep_better(
            (scales, best_zeros, error), (best_scales, best_zeros, best_error)
        )
    return best_scales, best_zeros


def _candidates(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, min_zero: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Grids of shrunken ranges. A symmetric grid has one more code below its zero than above: the full-range one turns
    that side, by the sign of its scale, to where the group reaches farthest."""
    for step in range(SHRINK_STEPS + 1):
        ratio = 1 - (1 - SHRINK_LEAST) * step / SHRINK_STEPS
        if step:
            yield make_grid(low * ratio, high * ratio, bits, symmetric, min_zero)
        if symmetric:
            yield full_range_grid(low * ratio, high * ratio, bits)


def _try(
    groups: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes, and the importance-weighted squared error of each group."""
    codes = encode(groups, scales, zeros, bits)
    error = (
        (codes - zeros.unsqueeze(-1))
        .mul_(scales.unsqueeze(-1))
        .sub_(groups)
        .square_()
        .mul_(importance)
    ).sum(-1)
    return codes, error


def _keep_better(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per group, whichever of two (scales, zeros, error) has the lower error."""
    better = new[-1] < old[-1]
    return tuple(torch.where(better, n, o) for n, o in zip(new, old, strict=True))


def _refit(groups: Tensor, importance: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """The scale that minimises sum(importance * (steps * scale - w)^2) for fixed codes; the old one where undefined."""
    weighted = steps * importance
    norm = (weighted * steps).sum(-1)
    fitted = (weighted * groups).sum(-1) / norm.clamp(min=1e-30)
    return round_scales(torch.where((norm > 0) & (fitted * scales > 0), fitted, scales))
