"""Bits per layer under a budget (`--auto-bits AVG`): many where rounding is felt, few where it is not.

Each group of linears (they share an input, or are a layer's experts; runtimes fuse them, so they share their bits too)
is rounded at every width with searched ranges, alone, and its block replayed on a few tokens. Its sensitivity is what
that adds to the residual stream: the mean over tokens of |h' - h|^2 / |h|^2 with h the block's output. It is relative
because the next norm is, and comparable from block to block because all blocks add to one stream; as errors of
different layers point in unrelated directions, sensitivities add up. The widths of least total sensitivity are wanted,
which is a knapsack:

    sensitivity |*                each group climbs from its fewest bits along the lower hull of its curve;
                | .               steps are taken in order of sensitivity saved per bit, over all groups,
                |   *  .  .  *    as long as the budget has room for them
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
from .blocks import BlockSource, linear
from .calibration import Samples
from .plan import Plan, fits_words, with_bits
from .recipe import Recipe

REPLAY_WINDOWS, REPLAY_TOKENS = 8, 64  # a few tokens of each kind of text
Group = tuple[str, ...]  # full names of its linears
Sensitivity = dict[int, float]  # by bits


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
    sensitivity: dict[Group, Sensitivity] = {}
    sizes: dict[Group, int] = {}
    for index in range(len(source)):
        block, shapes = source.load(index), source.linear_shapes(index)
        first = {name: group[0] for group in source.groups(index) for name in group}
        together = [sum(stage, ()) for stage in source.stages(index)]  # experts have the same bits
        full = {
            group: tuple(f"{source.name(index)}.{name}" for name in group) for group in together
        }
        groups = [group for group in together if full[group][0] in plan.group_sizes]
        importance = calibration.mean_squares(
            block, hidden, arguments[index], {first[name] for group in groups for name in group}
        )
        output = _run(block, hidden, arguments[index])
        for group in groups:
            sizes[full[group]] = sum(prod(shapes[name]) for name in group)
            sensitivity[full[group]] = {}
            for bits in recipe.widths:
                if fits_words([shapes[name] for name in group], bits):
                    noisy = _rounded_run(
                        block,
                        group,
                        hidden,
                        arguments[index],
                        [importance[first[name]] for name in group],
                        (bits, plan.group_sizes[full[group][0]], recipe.symmetric),
                    )
                    sensitivity[full[group]][bits] = _relative(
                        source.carried.hidden(noisy - output), source.carried.hidden(output)
                    )
        hidden = output
        source.checkpoint.release()
        tell(index + 1, time.monotonic() - start)
    chosen = distribute(sensitivity, sizes, recipe.auto_bits or recipe.bits)
    return with_bits(plan, recipe, {name: bits for group, bits in chosen.items() for name in group})


def distribute(
    sensitivity: dict[Group, Sensitivity], sizes: dict[Group, int], average: float
) -> dict[Group, int]:
    """Bits for each group, so that the mean over sizes is at most `average` and their sensitivity small."""
    chosen = {group: min(curve) for group, curve in sensitivity.items()}
    left = average * sum(sizes.values()) - sum(
        bits * sizes[group] for group, bits in chosen.items()
    )
    steps = [
        (saved / sizes[group], group, low, high)
        for group, curve in sensitivity.items()
        for saved, low, high in _lower_hull(curve)
    ]
    for _, group, low, high in sorted(steps, key=lambda step: -step[0]):
        cost = (high - low) * sizes[group]
        if chosen[group] == low and cost <= left:
            chosen[group], left = high, left - cost
    return chosen


def _lower_hull(curve: Sensitivity) -> list[tuple[float, int, int]]:
    """Steps (saved per bit, from, to) up the lower hull of a curve, each saving less than the one before."""
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
    group: tuple[str, ...],
    hidden: Tensor,
    kwargs: dict[str, Any],
    importance: list[Tensor],
    grid: tuple[int, int, bool],
) -> Tensor:
    """The block's output with the linears of one group rounded; they are as before afterwards."""
    linears = [linear(block, name) for name in group]
    originals = [module.weight.clone() for module in linears]
    for module, weight, importance_of in zip(linears, originals, importance, strict=True):
        module.weight.copy_(search.quantize(weight, importance_of, *grid).dequantize())
    output = _run(block, hidden, kwargs)
    for module, weight in zip(linears, originals, strict=True):
        module.weight.copy_(weight)
    return output


def _run(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = block(hidden, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _relative(noise: Tensor, signal: Tensor) -> float:
    """Mean over tokens of |noise|^2 / |signal|^2."""
    return (noise.square().sum(-1) / signal.square().sum(-1).clamp(min=1e-30)).mean().item()
