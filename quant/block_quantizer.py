"""One decoder block quantized: AWQ's scales folded, then each stage of linears as its inputs arrive.

The pipeline calls this for one block after the other and writes down what it returns; everything that decides how well
a block is quantized is here and in `algorithms/`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import calibration
from .algorithms import awq, fp8, gptq
from .blocks import BlockSource
from .calibration import Samples
from .folding import fold_block
from .plan import Plan, Recipe
from .weight import QuantizedWeight, split

REPLAY_WINDOWS, REPLAY_TOKENS = 8, 64  # a few tokens of each kind of text, to judge AWQ's scales on
MEAN_WINDOWS = 8  # for the mean magnitudes of activations


@dataclass(slots=True)
class BlockResult:
    """What became of a block."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)  # by name within the block
    layer_error: dict[str, float] = field(default_factory=dict)  # full name -> |(W - Q) x|^2 / |W x|^2 on calibration
    fallbacks: dict[str, str] = field(default_factory=dict)  # full name -> why round-to-nearest was used


class Activations:
    """What enters the next block: hidden states [n, T, hidden], and each block's other arguments for them."""

    def __init__(self, source: BlockSource, samples: Samples, state: dict[str, Tensor] | None = None):
        """state: what `state()` gave before the block to go on with; None: before the first."""
        self.hidden = source.embed(samples.token_ids) if state is None else state["hidden"].to(source.device)
        self.arguments = source.keyword_arguments(self.hidden[:1])
        self.replay_arguments = source.keyword_arguments(self.replay[:1])

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on with the next block in another process, exactly."""
        return {"hidden": self.hidden}

    @property
    def replay(self) -> Tensor:
        """The small part of them on which AWQ's scales are judged."""
        return self.hidden[:REPLAY_WINDOWS, :REPLAY_TOKENS]


@torch.no_grad()
def quantize_block(source: BlockSource, index: int, block: nn.Module, activations: Activations | None, plan: Plan,
                   recipe: Recipe) -> BlockResult:
    """Quantize the linears of a block and take the activations through it (None: the method needs none)."""
    full = {name: f"{source.name(index)}.{name}" for stage in source.map.stages for name in stage}
    stages = {stage[0]: stage for stage in source.map.stages if full[stage[0]] in plan.group_sizes}
    result = BlockResult()
    if activations is None:
        result.weights = {name: fp8.quantize(block.get_submodule(name).weight)
                          for stage in stages.values() for name in stage}
        return result
    arguments = activations.arguments[index]
    grids = {name: plan.grid(full[name], recipe) for stage in stages.values() for name in stage}
    mean_abs = calibration.mean_abs_inputs(block, activations.hidden[:MEAN_WINDOWS], arguments, stages)
    fold_block(block, source.map, mean_abs, activations.replay, activations.replay_arguments[index], grids, plan.dtype)

    def quantize(site: str, hessian: Tensor) -> None:
        linears = {full[name]: block.get_submodule(name) for name in stages[site]}
        weights = _quantize_stage({name: linear.weight for name, linear in linears.items()}, hessian, plan, recipe,
                                  result)
        for name, linear, weight in zip(stages[site], linears.values(), weights, strict=True):
            linear.weight.copy_(weight.dequantize())
            result.weights[name] = weight

    calibration.run_quantizing(block, activations.hidden, arguments, stages, quantize)
    return result


def _quantize_stage(weights: dict[str, Tensor], hessian: Tensor, plan: Plan, recipe: Recipe,
                    report: BlockResult) -> list[QuantizedWeight]:
    """Quantize linears {full name: [out_i, in]} that share their input, whose E[x x^T] is given."""
    matrices = list(weights.values())
    # GPTQ v1 stores zero - 1 and so cannot hold a zero point of 0
    min_zero = 1 if recipe.method == "gptq" and not recipe.symmetric else 0
    result = gptq.quantize(torch.cat(matrices), hessian, *plan.grid(next(iter(weights)), recipe), min_zero)
    if result.fallback:
        report.fallbacks |= dict.fromkeys(weights, result.fallback)
    quantized = split(result.weight, [len(matrix) for matrix in matrices])
    for (name, matrix), q in zip(weights.items(), quantized, strict=True):
        norm = awq.hessian_loss(matrix, hessian)
        report.layer_error[name] = awq.hessian_loss(q.dequantize() - matrix, hessian) / max(norm, 1e-30)
    return quantized
