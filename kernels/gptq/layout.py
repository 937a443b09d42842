"""ShuffledWeight: the one layout of integer and FP8 weights that the Triton products read, made once at load.

A *tile* is `16 // bits` planes of 32 input features, for one output feature, in 16 words of 32 bits. With 4 bits:

    bit of a word   31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
    plane             3       2       1       0    |   3       2       1       0
    feature               2i + 1 of its plane      |        2i of its plane           i: the word's row, 0..15

so `(word & 0x000f000f) | 0x64006400` is two float16 values 1024 + q that an MMA instruction wants in one register: four
LOP3 and one shift decode eight weights. Words lie in memory in the order in which the threads of a warp hold the MMA
operand, so that a thread's four words of a tile are one 128-bit load and a warp's are contiguous:

    words [tiles, padded_out, 16] int32      word 4t + j of a tile is row i = 4j + t        (t: lane % 4)

3-bit codes leave bits 15 and 31 of a word empty: 3.2 bits a weight. Scales are one of
    int32  [groups, padded_out]     the scale's 16 bits (float16 or bfloat16) above, the zero point below
    float32 [2, groups, padded_out] scales, then minima: w = q * scale + minimum; for scales that 16 bits do not hold
    float32 [groups, padded_out]    FP8: w = code * scale. A code is a byte, as with 8-bit integers
Padded features have code 0 and scale 0. Groups are what the kernels can step by: 16 features or a multiple of 32; a
format's own group that is larger is repeated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight

PLANE = 32  # features a plane of a tile holds
PAD_OUT = 128  # outputs are padded to multiples of this: the widest tile of a product
LOCK_OUT = 64  # outputs a lock is for: the narrowest tile


@dataclass(slots=True)
class ShuffledWeight:
    words: Tensor  # int32 [tiles, padded_out, 16]
    scales: Tensor  # see above
    packed_scale: (
        torch.dtype | None
    )  # of packed scales: torch.float16 or torch.bfloat16; None: float32 with minima
    perm: Tensor | None  # int64 [in]: column j of the product is feature perm[j]
    bits: int
    group: int  # features that share a scale; 0: all
    in_features: int
    out_features: int
    fp8: bool  # codes are e4m3 floats, not integers
    locks: Tensor  # int32, zero between launches: how many parts of a split product have arrived, per output tile

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


def shuffle(weight: QuantizedWeight) -> ShuffledWeight:
    """Canonical [out, in] codes to the layout above, on the weight's own device."""
    out_features, in_features = weight.codes.shape
    bits, planes = weight.bits, 16 // weight.bits
    group = kernel_group(weight.group_size, in_features, bits)
    if group is None:
        raise ValueError(
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
    scales, packed_scale = _scales(weight, group, groups, padded_out)
    locks = torch.zeros(8 * padded_out // LOCK_OUT, dtype=torch.int32, device=codes.device)
    return ShuffledWeight(
        words,
        scales,
        packed_scale,
        weight.perm,
        bits,
        group,
        in_features,
        out_features,
        weight.kind == "fp8",
        locks,
    )


def _scales(
    weight: QuantizedWeight, group: int, groups: int, padded_out: int
) -> tuple[Tensor, torch.dtype | None]:
    scales = weight.scales.float()
    if weight.kind == "fp8":
        return _spread(scales, weight, group, groups, padded_out), None
    kept = next(
        (t for t in (torch.float16, torch.bfloat16) if torch.equal(scales.to(t).float(), scales)),
        None,
    )
    if weight.mins is None and kept is not None:
        zeros = (
            weight.zeros
            if weight.zeros is not None
            else torch.full_like(scales, 2 ** (weight.bits - 1))
        )
        packed = (scales.to(kept).view(torch.int16).int() << 16) | zeros.int()
        return _spread(packed, weight, group, groups, padded_out), kept
    if weight.mins is not None:
        mins = weight.mins.float()
    else:
        mins = -scales * (
            weight.zeros.float() if weight.zeros is not None else 2 ** (weight.bits - 1)
        )
    return torch.stack(
        [_spread(t, weight, group, groups, padded_out) for t in (scales, mins)]
    ), None


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
