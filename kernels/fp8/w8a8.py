"""FP8 weights with FP8 activations (W8A8) on a CUDA device with FP8 tensor cores: Ada, Hopper, Blackwell.

Activations are quantized as the format asks: a scale per token, per token and group of features, or the static scale of
the checkpoint. Few rows are quantized inside the product, where reading the weights takes the time: one launch, and
scales per token and 128 features even where one per token would do, which only lowers the error. More rows are
quantized by a launch of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..device import cuda_capability, num_sms, why_no_triton
from ..spec import LinearSpec
from .layout import MIN_STEP, Fp8Weight, fp8_weight, groups, step
from .tiles import Table, table

MAX_WIDTH = 32768  # a row in the registers of the program that finds its scale


@dataclass(slots=True)
class Prepared:
    weight: Fp8Weight
    table: Table
    num_sms: int  # multiprocessors of the card


class Fp8W8A8Kernel:
    """y = x W^T with e4m3 codes on both sides and float32 sums."""

    name = "fp8-w8a8-triton"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "fp8":
            return f"needs FP8 weights, not {spec.kind}"
        if spec.act_quant == "none":
            return "the checkpoint quantizes weights alone; one with --fp8 has FP8 activations"
        if spec.permuted:
            return "needs input features in their own order"
        group, x_group = groups(spec.block[1], spec.in_features, spec.act_quant)
        if step(group, x_group) < MIN_STEP:
            return f"needs blocks of a multiple of {MIN_STEP} columns, not {spec.block[1]}"
        if spec.in_features > MAX_WIDTH:
            return f"quantizes rows of up to {MAX_WIDTH} features, not {spec.in_features}"
        missing = why_no_triton(spec.device, spec.act_dtype)
        cc = cuda_capability(spec.device) if missing is None else None
        if cc is not None and cc < 89:
            return f"FP8 tensor cores need compute capability 8.9 (Ada, Hopper or later), this card has {cc / 10}"
        return missing

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        if isinstance(weight, Tensor):
            raise TypeError("a dense weight was given to a kernel for quantized ones")
        chosen = table(torch.cuda.get_device_name(spec.device), cuda_capability(spec.device))
        return Prepared(fp8_weight(weight.to(spec.device)), chosen, num_sms(spec.device))

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        return multiply(rows, prepared, bias).view(*x.shape[:-1], prepared.weight.out_features)


def multiply(x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
    """x [M, K] float16 or bfloat16 -> [M, N]."""
    from . import launch  # imports Triton, which a machine without a GPU need not have

    weight, chosen = prepared.weight, prepared.table
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, weight.out_features)
    if rows <= chosen.quantize_rows:
        return launch.gemm(
            x, None, weight, bias, x.dtype, chosen.tile(rows), chosen.promote, prepared.num_sms
        )
    codes, scales = launch.quantize(x, weight.x_group, weight.input_scale)
    return launch.gemm(
        codes, scales, weight, bias, x.dtype, chosen.tile(rows), chosen.promote, prepared.num_sms
    )
