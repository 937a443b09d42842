"""Pairs of a token and an expert, sorted by expert, in tiles that each have one expert.

    pair  = token * top_k + place: what `chosen` [T, top_k] holds an expert for
    tiles   | expert 0: its pairs, padding | expert 0: more of them, padding | expert 3: ... | not used
    pairs   [tiles * block_m]   int32, in ascending order within an expert; padding is the number of all pairs
    experts [tiles]             int32
    num_tiles [1]               int32: those that are used

How many tiles there may be follows from the numbers of tokens and experts alone, so that a grid does, and a CUDA graph
can hold it. A program finds the pairs of one expert: each counts all pairs, so that none waits for another.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fused.rows import need, need_rows

BLOCK = 1024  # pairs looked at at once


@dataclass(frozen=True, slots=True)
class Alignment:
    """As the module's docstring has it."""

    pairs: Tensor
    experts: Tensor
    num_tiles: Tensor
    block_m: int


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most that so many pairs can need: an expert that has any fills all its tiles but one."""
    return min(num_pairs, (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m)


@triton.jit(do_not_specialize=["num_pairs"])
def align_kernel(
    chosen,  # int32 [num_pairs]
    pairs,
    experts,
    num_tiles,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (NUM_EXPERTS,)."""
    expert = tl.program_id(0)
    step = tl.arange(0, BLOCK)
    counts = tl.zeros((PADDED_EXPERTS,), tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pair = first + step
        found = tl.load(chosen + pair, mask=pair < num_pairs, other=0)
        counts += tl.histogram(found, PADDED_EXPERTS, mask=pair < num_pairs)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    number = tl.arange(0, PADDED_EXPERTS)
    before = tl.sum(tl.where(number < expert, tiles, 0))
    own = tl.sum(tl.where(number == expert, tiles, 0))
    if expert == NUM_EXPERTS - 1:
        tl.store(num_tiles, before + own)
    for first in range(0, own, BLOCK):
        tl.store(experts + before + first + step, expert, mask=first + step < own)
    places = pairs + before * BLOCK_M
    written = 0
    for first in range(0, num_pairs, BLOCK):
        pair = first + step
        found = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        is_own = (found == expert).to(tl.int32)
        tl.store(places + written + tl.cumsum(is_own, 0) - 1, pair, mask=is_own != 0)
        written += tl.sum(is_own)
    padding = written + tl.arange(0, BLOCK_M)
    tl.store(places + padding, num_pairs, mask=padding < own * BLOCK_M)


def align(chosen: Tensor, num_experts: int, block_m: int) -> Alignment:
    """chosen int32 [T, top_k], T above 0, each below num_experts -> tiles of block_m pairs, a power of two.

    Raises KernelArgumentError naming the argument that does not fit.
    """
    need_rows("align", "chosen", chosen, (torch.int32,), None, None)
    need(chosen.is_contiguous() and chosen.numel() > 0, "align", "chosen must be contiguous rows")
    num_pairs = chosen.numel()
    tiles = max_tiles(num_pairs, num_experts, block_m)
    pairs, experts, num_tiles = (
        torch.empty(size, dtype=torch.int32, device=chosen.device)
        for size in (tiles * block_m, tiles, 1)
    )
    align_kernel[(num_experts,)](
        chosen,
        pairs,
        experts,
        num_tiles,
        num_pairs,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return Alignment(pairs, experts, num_tiles, block_m)
