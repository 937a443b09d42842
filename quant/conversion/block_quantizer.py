"""One decoder block quantized: AWQ's scales folded, then each group of linears as its inputs arrive.

The pipeline calls this for one block after the other and writes down what it returns; everything that decides how well
a block is quantized is here and in `algorithms/`.
"""

import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...architectures.base import Attention
from ..algorithms import awq, gptq
from ..scheme import LayerScheme
from ..weight import QuantizedWeight, split
from . import calibration, float_quantizer
from .blocks import BlockSource, linear
from .calibration import Samples
from .experts import too_few
from .float_quantizer import KeyValueRange
from .folding import Grid, fold_block
from .plan import Plan
from .recipe import Recipe

logger = logging.getLogger(__name__)

FOLD_WINDOWS = 8  # to find AWQ's scales on
ACTIVATION_BYTES = 2 << 30  # of hidden states in memory, and as much again inside a block


@dataclass(slots=True)
class BlockResult:
    """What became of a block."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)  # by name within the block
    layer_error: dict[str, float] = field(
        default_factory=dict
    )  # full name -> |(W - Q) x|^2 / |W x|^2 on calibration
    fallbacks: dict[str, str] = field(
        default_factory=dict
    )  # full name -> why round-to-nearest was used
    scales: dict[str, Tensor] = field(
        default_factory=dict
    )  # of the KV cache, by name within the block
    note: str = ""  # for people: what calibration lacked


class Activations:
    """What enters the next block: hidden states [n, T, hidden] and what is carried behind them (carried.py), and each
    block's other arguments for them."""

    def __init__(
        self,
        source: BlockSource,
        samples: Samples,
        state: dict[str, Tensor] | None = None,
        folder: Path | None = None,
        bound: int = ACTIVATION_BYTES,
    ):
        """state: what `state()` gave before the block to go on with; None: before the first.

        bound: bytes of activations in memory. Hidden states that are more lie in a file in `folder`, mapped; and inside
        a block, only as many windows go at once as it allows.
        """
        self.at_once = windows_at_once(source, samples.token_ids.shape[1], bound)
        nbytes = samples.token_ids.numel() * source.carried.width * 4
        if folder is not None and nbytes > bound and source.device.type == "cpu":
            self.hidden = _on_disk((*samples.token_ids.shape, source.carried.width), folder)
            for first in range(0, len(self.hidden), self.at_once):
                part = slice(first, first + self.at_once)
                self.hidden[part] = (
                    source.embed(samples.token_ids[part])
                    if state is None
                    else state["hidden"][part]
                )
        elif state is None:
            self.hidden = source.embed(samples.token_ids)
        else:
            self.hidden = state["hidden"].clone().to(source.device)
        self.arguments = source.keyword_arguments(self.hidden[:1])

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on with the next block in another process, exactly."""
        return {"hidden": self.hidden}


def windows_at_once(source: BlockSource, length: int, bound: int) -> int:
    """How many windows of `length` tokens may go through a block together for what is inside it to stay in bound."""
    per_token = 4 * max(_inner_width(source, index) for index in range(len(source)))
    return max(1, bound // (length * per_token))


def _inner_width(source: BlockSource, index: int) -> int:
    """Numbers that a token has inside a block; of its experts one computes at a time."""
    return sum(
        max(out, group.in_features)
        for group in source.linear_groups(index)
        for out in group.out_features
    )


def _on_disk(shape: tuple[int, ...], folder: Path) -> Tensor:
    """A float32 tensor in a file without a name, which the system writes out as it needs memory."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(
            file.fileno(), 0, prod(shape) * 4
        )  # a full disk is an error here, not a signal later
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


@torch.no_grad()
def quantize_block(
    source: BlockSource,
    index: int,
    block: nn.Module,
    activations: Activations | None,
    plan: Plan,
    recipe: Recipe,
) -> BlockResult:
    """Quantize the linears of a block and take the activations through it (None: the method needs none)."""
    full = {
        name: f"{source.name(index)}.{name}" for group in source.groups(index) for name in group
    }
    groups = {
        group[0]: group for group in source.groups(index) if full[group[0]] in plan.group_sizes
    }
    result = BlockResult()
    cache = KeyValueRange(isinstance(source.spec.layers[index].mixer, Attention))
    if recipe.method == "fp8":
        _quantize_float(block, full, groups, activations, index, cache, recipe.fp8_layer, result)
        result.scales = _kv_scales(source, index, cache, recipe)
        return result
    if activations is None:
        raise ValueError(f"{recipe.method} needs activations")
    arguments = activations.arguments[index]
    grids = {name: plan.grid(full[name], recipe) for group in groups.values() for name in group}
    first = activations.hidden[:FOLD_WINDOWS]
    folds = {fold.reads: fold for fold in source.folds(index) if fold.consumers[0] in groups}
    for reads in calibration.in_memory(block, folds):
        # statistics are as large as Hessians: they must not live on
        fold_block(
            block,
            [folds[module] for module in reads],
            calibration.input_statistics(block, first, arguments, reads),
            grids,
            plan.dtype,
            1.0 if source.spec.norm_offset else 0.0,
        )

    def quantize(first_linear: str, hessian: Tensor) -> None:
        linears = {full[name]: linear(block, name) for name in groups[first_linear]}
        weights = _quantize_group(
            {name: module.weight for name, module in linears.items()}, hessian, plan, recipe, result
        )
        for name, module, weight in zip(
            groups[first_linear], linears.values(), weights, strict=True
        ):
            module.weight.copy_(weight.dequantize())
            result.weights[name] = weight

    stages = [[names[0] for names in stage if names[0] in groups] for stage in source.stages(index)]
    calibration.run_quantizing(
        block,
        activations.hidden,
        cache.put_into(arguments),
        [stage for stage in stages if stage],
        quantize,
        activations.at_once,
    )
    if lack := too_few(block):
        result.note = f"{source.name(index)}: {lack}"
        logger.info("%s", result.note)
    result.scales = _kv_scales(source, index, cache, recipe)
    return result


def _kv_scales(
    source: BlockSource, index: int, cache: KeyValueRange, recipe: Recipe
) -> dict[str, Tensor]:
    mixer = source.spec.attention.get(index)
    if not recipe.kv_scales or mixer is None or mixer.kv_source is not None:
        return {}
    return cache.scales(mixer.module)


def _quantize_float(
    block: nn.Module,
    full: dict[str, str],
    groups: dict[str, tuple[str, ...]],
    activations: Activations | None,
    index: int,
    cache: KeyValueRange,
    layer: LayerScheme,
    result: BlockResult,
) -> None:
    """FP8: each group by itself, its error that on inputs of no preferred direction."""
    for group in groups.values():
        linears = [linear(block, name) for name in group]
        weights = float_quantizer.quantize([module.weight for module in linears], layer)
        for name, module, weight in zip(group, linears, weights, strict=True):
            rounded, original = weight.dequantize(), module.weight
            error = (rounded - original).square().sum() / original.square().sum().clamp(min=1e-30)
            result.layer_error[full[name]] = error.item()
            module.weight.copy_(rounded)
            result.weights[name] = weight
    if activations is not None:
        arguments = cache.put_into(activations.arguments[index])
        result.weights = float_quantizer.with_static_scales(
            result.weights, groups, block, activations.hidden, arguments, activations.at_once
        )


def _quantize_group(
    weights: dict[str, Tensor], hessian: Tensor, plan: Plan, recipe: Recipe, report: BlockResult
) -> list[QuantizedWeight]:
    """Quantize linears {full name: [out_i, in]} that share their input, whose E[x x^T] is given."""
    matrices = list(weights.values())
    # GPTQ v1 stores zero - 1 and so cannot hold a zero point of 0
    min_zero = 1 if recipe.target == "gptq" and not recipe.symmetric else 0
    grid = plan.grid(next(iter(weights)), recipe)
    if recipe.desc_act:
        result = _in_order_of_importance(torch.cat(matrices), hessian, grid, min_zero)
    else:
        result = gptq.quantize(torch.cat(matrices), hessian, *grid, min_zero)
    if result.fallback:
        report.fallbacks |= dict.fromkeys(weights, result.fallback)
    quantized = split(result.weight, [len(matrix) for matrix in matrices])
    for (name, matrix), q in zip(weights.items(), quantized, strict=True):
        norm = awq.hessian_loss(matrix, hessian)
        report.layer_error[name] = awq.hessian_loss(q.dequantize() - matrix, hessian) / max(
            norm, 1e-30
        )
    return quantized


def _in_order_of_importance(
    weight: Tensor, hessian: Tensor, grid: Grid, min_zero: int
) -> gptq.Result:
    """GPTQ with act-order: columns sorted by E[x^2] before groups are cut, so each holds columns that matter alike."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    result = gptq.quantize(weight[:, order], hessian[order][:, order], *grid, min_zero)
    return replace(result, weight=replace(result.weight, perm=order))
