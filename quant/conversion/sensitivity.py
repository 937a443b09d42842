"""Bits per layer under a budget (`--auto-bits AVG`): many where rounding is felt, few where it is not.

Each stage of linears (they share an input, and runtimes fuse them, so they share their bits too) is rounded at every
width with searched ranges, alone, and its block replayed on a few tokens. The damage is what that adds to the residual
stream: the mean over tokens of |h' - h|^2 / |h|^2 with h the block's output. It is relative because the next norm is,
and comparable from block to block because all blocks add to one stream; as errors of different layers point in
unrelated directions, damages add up. So the widths of least total damage are wanted, which is a knapsack:

    damage |*                     each stage climbs from its fewest bits along the lower hull of its curve;
           | .                    steps are taken in order of damage saved per bit, over all stages,
           |   *  .  .  *         as long as the budget has room for them
           +--2--3--4-----8 bits
"""

import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import search
from . import calibration
from .blocks import BlockSource
from .calibration import Samples
from .plan import Plan, Recipe, fits_words, with_bits

REPLAY_WINDOWS, REPLAY_TOKENS = 8, 64  # a few tokens of each kind of text
Stage = tuple[str, ...]  # full names of its linears
Damage = dict[int, float]  # by bits


@torch.no_grad()
def allocate(
    source: BlockSource,
    samples: Samples,
    plan: Plan,
    recipe: Recipe,
    tell: Callable[[int, float], None],
) -> Plan:
    """The plan with bits for each module, at most recipe.auto_bits on average over all quantized weights.

    One block is in memory at a time; tell(blocks done, seconds) is called after each.
    """
    start = time.monotonic()
    hidden = source.embed(samples.token_ids[:REPLAY_WINDOWS, :REPLAY_TOKENS])
    arguments = source.keyword_arguments(hidden[:1])
    damage: dict[Stage, Damage] = {}
    sizes: dict[Stage, int] = {}
    for index in range(len(source)):
        block, shapes = source.load(index), source.linear_shapes(index)
        full = {
            stage: tuple(f"{source.name(index)}.{name}" for name in stage)
            for stage in source.map.stages
        }
        stages = [stage for stage in source.map.stages if full[stage][0] in plan.group_sizes]
        inputs = calibration.input_statistics(
            block, hidden, arguments[index], [stage[0] for stage in stages]
        )
        output = _run(block, hidden, arguments[index])
        for stage in stages:
            sizes[full[stage]] = sum(prod(shapes[name]) for name in stage)
            damage[full[stage]] = {}
            for bits in recipe.widths:
                if fits_words([shapes[name] for name in stage], bits):
                    noisy = _rounded_run(
                        block,
                        stage,
                        hidden,
                        arguments[index],
                        inputs[stage[0]].products.diagonal(),
                        (bits, plan.group_sizes[full[stage][0]], recipe.symmetric),
                    )
                    damage[full[stage]][bits] = _relative(noisy - output, output)
        hidden = output
        source.checkpoint.release()
        tell(index + 1, time.monotonic() - start)
    chosen = distribute(damage, sizes, recipe.auto_bits or recipe.bits)
    return with_bits(plan, recipe, {name: bits for stage, bits in chosen.items() for name in stage})


def distribute(
    damage: dict[Stage, Damage], sizes: dict[Stage, int], average: float
) -> dict[Stage, int]:
    """Bits for each stage, so that the mean over sizes is at most `average` and the damage as small as steps go."""
    chosen = {stage: min(curve) for stage, curve in damage.items()}
    left = average * sum(sizes.values()) - sum(
        bits * sizes[stage] for stage, bits in chosen.items()
    )
    steps = [
        (saved / sizes[stage], stage, low, high)
        for stage, curve in damage.items()
        for saved, low, high in _hull(curve)
    ]
    for _, stage, low, high in sorted(steps, key=lambda step: -step[0]):
        cost = (high - low) * sizes[stage]
        if chosen[stage] == low and cost <= left:
            chosen[stage], left = high, left - cost
    return chosen


def _hull(curve: Damage) -> list[tuple[float, int, int]]:
    """Steps (damage saved per bit, from, to) up the lower hull of a curve, each saving less than the one before."""
    steps, low = [], min(curve)
    while rises := [
        ((curve[low] - curve[bits]) / (bits - low), bits)
        for bits in curve
        if bits > low and curve[bits] < curve[low]
    ]:
        saved, high = max(rises)
        steps.append((saved, low, high))
        low = high
    return steps


def _rounded_run(
    block: nn.Module,
    stage: tuple[str, ...],
    hidden: Tensor,
    kwargs: dict[str, Any],
    importance: Tensor,
    grid: tuple[int, int, bool],
) -> Tensor:
    """The block's output with the linears of one stage rounded; they are as before afterwards."""
    linears = [block.get_submodule(name) for name in stage]
    originals = [linear.weight.clone() for linear in linears]
    for linear, weight in zip(linears, originals, strict=True):
        linear.weight.copy_(search.quantize(weight, importance, *grid).dequantize())
    output = _run(block, hidden, kwargs)
    for linear, weight in zip(linears, originals, strict=True):
        linear.weight.copy_(weight)
    return output


def _run(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _relative(noise: Tensor, signal: Tensor) -> float:
    """Mean over tokens of |noise|^2 / |signal|^2."""
    return (noise.square().sum(-1) / signal.square().sum(-1).clamp(min=1e-30)).mean().item()
