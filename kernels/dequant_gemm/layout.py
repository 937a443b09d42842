"""ShuffledWeight: the one layout of 2-, 3-, 4- and 8-bit codes that the Triton products read, made once at load.

A *tile* is `16 // bits` planes of 32 input features, for one output feature, in 16 words of 32 bits. With 4 bits:

    bit of a word   31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
    plane             3       2       1       0    |   3       2       1       0
    feature               2i + 1 of its plane      |        2i of its plane           i: the word's row, 0..15

so `(word & 0x000f000f) | 0x64006400` is two float16 values 1024 + q that an MMA instruction wants in one register: four
LOP3 and one shift decode eight weights. Words lie in memory in the order in which the threads of a warp hold the MMA
operand, so that a thread's four words of a tile are one 128-bit load and a warp's are contiguous:

    words [tiles, padded_out, 16] int32      word 4t + j of a tile is row i = 4j + t        (t: lane % 4)

3-bit codes leave bits 15 and 31 of a word empty: 3.2 bits a weight. How a code becomes a number, and how scales lie, is
the room's own: it hands over both (`Decode`), the scales as tensors [out blocks, in blocks], which are spread to
[groups, padded_out], or [n, groups, padded_out] if there are several. Padded features have code 0 and scale 0. Groups
are what the kernels can step by: 16 features or a multiple of 32; a format's own group that is larger is repeated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..errors import KernelArgumentError

PLANE = 32  # features a plane of a tile holds
PAD_OUT = 128  # outputs are padded to multiples of this: the widest tile of a product
LOCK_OUT = 64  # outputs a lock is for: the narrowest tile


@dataclass(frozen=True, slots=True)
class Decode:
    """The @triton.jit functions that decode.py describes: the loops are compiled anew for each."""

    code: Any
    scale: Any
    has_minimum: bool = False


@dataclass(slots=True)
class ShuffledWeight:
    words: Tensor  # int32 [tiles, padded_out, 16]
    scales: Tensor  # [groups, padded_out] or [n, groups, padded_out], as decode.scale reads them
    decode: Decode
    perm: Tensor | None  # int64 [in]: column j of the product is feature perm[j]
    bits: int
    group: int  # features that share a scale; 0: all
    in_features: int
    out_features: int
    locks: Tensor  # int32, zero between launches: how many splits of a product have arrived, per output tile

    @property
    def tile_features(self) -> int:
        return PLANE * (16 // self.bits)


def kernel_group(group: int, in_features: int, bits: int) -> int | None:
    """The group the kernels step by for a format's `group`: 16, or a multiple of 32; 0 if there is only one; None if
    the planes cannot follow it. Where a tile neither divides a group nor is divided by it, a scale is read per plane.
    """
    if group >= in_features:
        return 0
    return group if group == 16 or group % PLANE == 0 else 16 if group % 16 == 0 else None


def shuffle(weight: QuantizedWeight, decode: Decode, *scales: Tensor) -> ShuffledWeight:
    """Canonical [out, in] codes to the layout above, on the weight's own device.

    scales: each [out blocks, in blocks] of the weight's, in what order and dtype decode.scale reads them. Raises
    KernelArgumentError where the planes cannot follow the weight's groups.
    """
    out_features, in_features = weight.codes.shape
    bits, planes = weight.bits, 16 // weight.bits
    group = kernel_group(weight.group_size, in_features, bits)
    if group is None:
        raise KernelArgumentError(
            f"no layout for groups of {weight.group_size}; the kernel's can_implement says so"
        )
    padded_out = -(-out_features // PAD_OUT) * PAD_OUT
    tiles = -(-in_features // (PLANE * planes))
    codes = torch.zeros(
        padded_out, tiles * PLANE * planes, dtype=torch.uint8, device=weight.codes.device
    )
    codes[:out_features, :in_features] = weight.codes.view(torch.uint8)
    # [n, tile, plane, j, t, half]: feature 8j + 2t + half of the plane
    halves = codes.view(padded_out, tiles, planes, 4, 4, 2).int()
    words = halves.new_zeros(padded_out, tiles, 4, 4)
    for plane in range(planes):
        for half in range(2):
            words |= halves[:, :, plane, :, :, half] << (16 * half + bits * plane)
    words = words.permute(1, 0, 3, 2).reshape(tiles, padded_out, 16).contiguous()
    groups = 1 if group == 0 else -(-tiles * PLANE * planes // group)
    spread = [_spread(values, weight, group, groups, padded_out) for values in scales]
    locks = torch.zeros(8 * padded_out // LOCK_OUT, dtype=torch.int32, device=codes.device)
    return ShuffledWeight(
        words,
        spread[0] if len(spread) == 1 else torch.stack(spread),
        decode,
        weight.perm,
        bits,
        group,
        in_features,
        out_features,
        locks,
    )


def _spread(
    values: Tensor, weight: QuantizedWeight, group: int, groups: int, padded_out: int
) -> Tensor:
    """[out blocks, in blocks] -> [groups, padded_out], each value repeated over the rows and groups it covers."""
    rows, cols = weight.block
    values = values.repeat_interleave(rows, 0)[: weight.out_features]
    if group:
        values = values.repeat_interleave(cols // group, 1)[:, :groups]
    spread = values.new_zeros(groups, padded_out)
    spread[: values.shape[1], : weight.out_features] = values.t()
    return spread
