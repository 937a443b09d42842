"""Prepared weights that come from outside, checked before the C++ kernels see them.

The kernels believe every number and follow every pointer. Invariant: once `check` has returned, everything that they
will read of a linear lies inside its tensors, and every number is one that `prepare` could have given.
"""

import math

import torch
from torch import Tensor

from . import library as lib
from .prepared import INT_GROUP, WIDE_GROUP, Prepared

_ROWS = 16  # outputs of a tile


def check(linear: Prepared, n: int, k: int) -> None:
    """ValueError, saying what, unless `linear` is whole and has n outputs of k inputs."""
    if (linear.n, linear.k) != (n, k):
        raise ValueError(f"it is of shape [{linear.n}, {linear.k}], want [{n}, {k}]")
    _check_numbers(linear)
    tiles, columns = -(-n // _ROWS), linear.k_padded
    by_group = (tiles, linear.groups, _ROWS)
    shape, dtype = {
        lib.U4: ((tiles, columns // 8, _ROWS, 4), torch.uint8),
        lib.T4: ((tiles, columns // 8, _ROWS, 4), torch.uint8),
        lib.U8: ((tiles, columns // 4, _ROWS, 4), torch.uint8),
        lib.FP8: ((tiles, columns // 2, 2, _ROWS), torch.uint8),
        lib.DENSE: ((tiles, columns // 2, _ROWS, 2), torch.int16),
    }[linear.format]
    _check_tensor("data", linear.data, shape, dtype)
    scales = {lib.FP8: torch.float32, lib.DENSE: None}.get(linear.format, torch.float16)
    _check_tensor("scales", linear.scales, by_group, scales)
    offsets = {lib.ZEROS: torch.uint8, lib.MINS: torch.float16}.get(linear.offset)
    _check_tensor("offsets", linear.offsets, by_group, offsets)
    if linear.bias is not None:
        _check_tensor("bias", linear.bias, (n,), torch.float32)
    table = torch.uint8 if linear.format == lib.T4 else None
    _check_tensor("table", linear.table, (16,), table)
    if linear.table is not None and int(linear.table.max()) > 127:
        raise ValueError("table holds numbers above 127")
    if linear.perm is not None:
        _check_tensor("perm", linear.perm, (k,), torch.int32)
        smallest, largest = torch.aminmax(linear.perm)
        if not 0 <= int(smallest) <= int(largest) < k:
            raise ValueError(f"perm names columns outside of 0 .. {k - 1}")


def _check_numbers(linear: Prepared) -> None:
    integer = linear.format in (lib.U4, lib.T4, lib.U8)
    widest = INT_GROUP if integer else WIDE_GROUP
    largest_midpoint = {lib.U4: 8, lib.T4: 127, lib.U8: 128}.get(linear.format, 0)
    fine = {
        "format": linear.format in (lib.U4, lib.T4, lib.U8, lib.FP8, lib.DENSE),
        "offset": linear.offset in ((lib.MIDPOINT, lib.ZEROS, lib.MINS) if integer else (lib.MIDPOINT,)),
        "group": linear.group % 8 == 0 and 8 <= linear.group <= widest,
        "midpoint": 0 <= linear.midpoint <= largest_midpoint,
        "multiplier": math.isfinite(linear.multiplier) and linear.multiplier > 0,
    }  # fmt: skip
    if wrong := [name for name, holds in fine.items() if not holds]:
        raise ValueError(f"{wrong[0]} is {getattr(linear, wrong[0])}")


def _check_tensor(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """dtype None: there must be no such tensor."""
    if (tensor is None) != (dtype is None):
        raise ValueError(f"{name} is {'missing' if tensor is None else 'there, but has no use'}")
    if tensor is None:
        return
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, want {dtype} of {shape}"
        )
