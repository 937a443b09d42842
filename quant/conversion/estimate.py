"""What a conversion will need, from headers alone: bytes of the result, disk, memory, time.

Sizes are exact up to headers. Memory is the process with its libraries, one block in float32 with what quantizing it
holds beside it, and the activations; time is operations over a speed measured in a fraction of a second. Both are
upper estimates of the same kind as the real peak and duration: right within tens of percent, not to the megabyte.
"""

import functools
import time
from dataclasses import dataclass
from math import prod

import torch

from ...architectures.base import experts_of
from ..checkpoint import Checkpoint
from ..checkpoint.writer import MAX_SHARD_BYTES
from .block_quantizer import ACTIVATION_BYTES
from .blocks import BlockSource
from .experts import LEAST_TOKENS
from .plan import Plan
from .recipe import Recipe

_PROCESS = 600_000_000  # Python, torch and transformers, before any tensor
_PROBE = 384  # rows and columns of the product that measures the machine


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes and seconds."""

    output: int  # weights of the result
    disk: int  # the most that is on disk at once
    memory: int  # the most that is in memory at once
    seconds: float


def estimate(
    checkpoint: Checkpoint, source: BlockSource, plan: Plan, recipe: Recipe, tokens: int
) -> Estimate:
    """For a conversion calibrated on `tokens` tokens."""
    shapes = {
        f"{source.name(i)}.{name}": shape
        for i in range(len(source))
        for name, shape in source.linear_shapes(i).items()
    }
    output = sum(
        _stored_bytes(shapes[m], recipe.auto_bits or recipe.bits, size, recipe)
        for m, size in plan.group_sizes.items()
    )
    skipped = {name for m in plan.group_sizes for name in checkpoint.weight_names(m)}
    output += (
        sum(prod(checkpoint.shape(name)) for name in checkpoint.names() - skipped)
        * plan.dtype.itemsize
    )
    hidden = 0 if not recipe.calibrated else tokens * source.carried.width * 4
    disk = output + min(output, MAX_SHARD_BYTES) + 2 * hidden
    blocks = [_linears(source, index, tokens) for index in range(len(source))]
    return Estimate(
        output,
        disk,
        max(_memory(block, hidden, tokens, recipe) for block in blocks),
        sum(_seconds(block, tokens, recipe) for block in blocks),
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear of a block, or one of `count` alike, each calibrated on `tokens` tokens."""

    out: int
    width: int
    count: int
    tokens: int

    @property
    def weights(self) -> int:
        return self.out * self.width * self.count


def _linears(source: BlockSource, index: int, tokens: int) -> list[_Linear]:
    mlp = source.spec.layers[index].mlp
    found = []
    for group in source.linear_groups(index):
        count, seen = group.num_experts or 1, tokens
        if (experts := experts_of(mlp)) is not None and count > 1:
            seen = max(tokens * experts.top_k // count, min(LEAST_TOKENS, tokens))
        found += [_Linear(out, group.in_features, count, seen) for out in group.out_features]
    return found


def _stored_bytes(shape: tuple[int, int], bits: float, group_size: int, recipe: Recipe) -> int:
    out_features, in_features = shape
    if recipe.method == "fp8":
        rows, cols = recipe.fp8_layer.block or (
            (1, in_features) if recipe.fp8_scheme == "channel" else shape
        )
        return out_features * in_features + 4 * -(-out_features // rows) * -(-in_features // cols)
    groups = out_features * -(-in_features // group_size)
    zeros = 0 if recipe.target == "compressed-tensors" and recipe.symmetric else groups
    g_idx = 4 * in_features if recipe.target in ("gptq", "gptq_v2") else 0
    return int((out_features * in_features + zeros) * bits // 8) + groups * 2 + g_idx


def _memory(block: list[_Linear], hidden: int, tokens: int, recipe: Recipe) -> int:
    weights = 4 * sum(each.weights for each in block)
    if not recipe.calibrated:
        return _PROCESS + 3 * weights
    widest = max(each.width for each in block)
    inner = min(
        ACTIVATION_BYTES, 4 * tokens * sum(max(each.out, each.width) for each in block)
    )  # between the block's linears
    hessians = 0 if recipe.method == "fp8" else 6 * 4 * widest**2
    return _PROCESS + 3 * weights + min(2 * hidden, ACTIVATION_BYTES) + inner + hessians


def _seconds(block: list[_Linear], tokens: int, recipe: Recipe) -> float:
    weights = sum(each.weights for each in block)
    passes = 2 * sum(each.weights * each.tokens for each in block)
    if recipe.method == "fp8":
        return weights * 20e-9 + (1.5 * passes / _flops() if recipe.calibrated else 0)
    forward = passes * 1.5  # the pass itself, and some windows for the scale search
    searches = 1 if recipe.auto_bits is None else 1 + len(recipe.widths)
    inputs = {(each.width, each.count, each.tokens) for each in block}  # gate and up share theirs
    hessians = sum(2 * seen * count * width**2 for width, count, seen in inputs)
    compensation = sum(each.weights * each.width for each in block) + 3 * sum(
        each.count * each.width**3 for each in block
    )
    return 1.5 * (forward + hessians + compensation) / _flops() + weights * 300e-9 * searches


@functools.cache
def _flops() -> float:
    """Multiplications and additions a second in a product of float32 matrices."""
    a = torch.ones(_PROBE, _PROBE)
    a @ a
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        a @ a
        count += 1
    return 2 * count * _PROBE**3 / (time.perf_counter() - start)
