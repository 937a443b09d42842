"""Fp8Weight: what the product of FP8 activations and FP8 weights (W8A8) reads, made once at load.

    codes  e4m3 [out, padded_in]     rows as in the checkpoint; padded with zeros to a multiple of 128 features
    scales float32 [out]             scales per tensor or output channel, or of rows of blocks: one per row
    scales float32 [rows, columns]   scales per block: of W[o, i] at (o // block_rows, i // group)

Nothing is shuffled: FP8 tensor cores take both operands as rows of K, from shared memory, so a 128-byte piece of a row,
copied there 16 bytes a thread, is already what they read. A weight whose rows are a multiple of 128 long is used as it
was loaded, with no copy. The products step by `step` features, which divides the groups of weights and activations, so
that one iteration of their loop, a tile of K, has one scale of each.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..errors import KernelArgumentError

STEP = 128  # features a tile of K has at most
MIN_STEP = 32  # what an FP8 tensor-core instruction takes
TILE_OUT = 64  # outputs of the narrowest tile


@dataclass(slots=True)
class Fp8Weight:
    codes: Tensor  # float8_e4m3fn [out, padded_in]
    scales: Tensor  # see above
    input_scale: (
        Tensor | None
    )  # float32 [1] where the format has a static scale for the activations
    in_features: int
    block_rows: int  # outputs that share a scale
    group: int  # features of a weight that share a scale; 0: all
    x_group: int  # features of an activation row that share a scale; 0: all
    step: int
    locks: Tensor  # int32, zero between launches: how many splits of a product have arrived, per output tile

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]


def groups(block_cols: int, in_features: int, act_quant: str) -> tuple[int, int]:
    """(features of a weight, features of an activation row) that share a scale; 0: all of a row. Activations take the
    weight's groups, in parts of a tile of K where those are longer."""
    group = block_cols if block_cols < in_features else 0
    return group, gcd(group, STEP) if act_quant == "group" else 0


def step(group: int, x_group: int) -> int:
    """Features a tile of K may have so that it meets one scale of each: a power of two up to 128."""
    return gcd(group, x_group, STEP)


def fp8_weight(weight: QuantizedWeight) -> Fp8Weight:
    """Canonical codes to the form above, on the weight's own device. KernelArgumentError where no tile fits."""
    out_features, in_features = weight.codes.shape
    group, x_group = groups(weight.block[1], in_features, weight.act_quant)
    if step(group, x_group) < MIN_STEP:
        raise KernelArgumentError(
            f"no FP8 product for groups of {weight.group_size}; the kernel's can_implement says so"
        )
    padded = -(-in_features // STEP) * STEP
    codes = weight.codes.contiguous()
    if padded != in_features:
        codes = torch.zeros(out_features, padded, dtype=torch.uint8, device=codes.device)
        codes[:, :in_features] = weight.codes.view(torch.uint8)
        codes = codes.view(torch.float8_e4m3fn)
    scales, rows = weight.scales.float().contiguous(), weight.block[0]
    if not group:
        scales, rows = scales.reshape(-1).repeat_interleave(rows)[:out_features].contiguous(), 1
    static = weight.input_scale if weight.act_quant == "tensor" else None
    locks = torch.zeros(8 * -(-out_features // TILE_OUT), dtype=torch.int32, device=codes.device)
    return Fp8Weight(
        codes,
        scales,
        None if static is None else static.float(),
        in_features,
        rows,
        group,
        x_group,
        step(group, x_group),
        locks,
    )
