"""Round to nearest on a per-group grid: the grid every integer method shares, and the simplest way to use it.

A grid is (scales, zeros) with value = (code - zero) * scale and 0 <= code < 2**bits. Invariant: a scale is rounded to
float16, the storage precision, before any code is picked with it, so what is stored is what was optimised.

    groups [out, n_groups, group_size]   importance [n_groups, group_size] or None   scales, zeros [out, n_groups]
"""

import torch
from torch import Tensor

from ..weight import QuantizedWeight

SCALE_FLOOR = (
    2.0**-20
)  # float16 still keeps four significant bits here; a group this small is as good as zero
FLOAT16_MAX = 65504.0


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] -> [out, in/group_size, group_size], a view. group_size -1: the whole row.

    Raises ValueError if the width is no multiple of the group size.
    """
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    if in_features % size:
        raise ValueError(f"group size {size} does not divide the width {in_features}")
    return weight.reshape(out_features, in_features // size, size)


def extent(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each group, widened to include 0, which every grid must hold."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def make_grid(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high]: float32 scales (already float16 values) and float32 integer zeros.

    Symmetric grids have their zero at 2**(bits-1) and span absmax on both sides. min_zero 1 is for GPTQ v1, which
    stores zero - 1 and cannot hold 0.
    """
    levels = 2**bits - 1
    if symmetric:
        scales = round_scales(2 * torch.maximum(-low, high) / levels)
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    scales = round_scales((high - low) / levels)
    zeros = (-low / scales).round().clamp(0, levels)
    if min_zero:  # only the groups with (almost) nothing below zero pay for it
        scales = torch.where(zeros < min_zero, round_scales(high / (levels - min_zero)), scales)
        zeros = zeros.clamp(min=min_zero)
    return scales, zeros


def full_range_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The symmetric grid whose lowest code stands for whichever of low and high is farther from 0, as Q4_0 has it: its
    scale is negative where that is high."""
    farthest = torch.where(high > -low, high, low)
    scales = round_scales(-farthest / 2 ** (bits - 1))
    return scales, torch.full_like(scales, 2 ** (bits - 1))


def round_scales(scales: Tensor) -> Tensor:
    """To the nearest float16 that is neither zero nor infinite, as float32; the sign is kept."""
    return scales.abs().clamp(SCALE_FLOOR, FLOAT16_MAX).copysign(scales).half().float()


def encode(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, as float32 integers, of the shape of groups."""
    return (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The values of codes [out, n_groups, group_size]."""
    return (codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)


def round_trip(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, min_zero: int = 0
) -> Tensor:
    """What `quantize` would make of a weight [out, in], as float32: for searches, which need no codes."""
    groups = to_groups(weight, group_size)
    scales, zeros = make_grid(*extent(groups), bits, symmetric, min_zero)
    return decode(encode(groups, scales, zeros, bits), scales, zeros).reshape(weight.shape)


def to_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool
) -> QuantizedWeight:
    """Wrap float codes [out, n_groups, group_size] and their grid in the canonical form."""
    out_features, n_groups, group_size = codes.shape
    return QuantizedWeight(
        codes=codes.reshape(out_features, n_groups * group_size).to(torch.uint8),
        scales=scales.half(),
        zeros=None if symmetric else zeros.to(torch.uint8),
        bits=bits,
        block=(1, group_size),
    )


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, min_zero: int = 0
) -> QuantizedWeight:
    """Round a float32 weight [out, in] to the nearest point of the grid that spans each group.

    group_size -1 means the whole row. Raises ValueError if the group size does not divide the width.
    """
    groups = to_groups(weight.float(), group_size)
    scales, zeros = make_grid(*extent(groups), bits, symmetric, min_zero)
    return to_weight(encode(groups, scales, zeros, bits), scales, zeros, bits, symmetric)
