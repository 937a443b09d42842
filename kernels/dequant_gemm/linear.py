"""y = x W^T for a ShuffledWeight of any room: GEMV, GEMM or dequantize-and-cuBLAS, by the number of rows."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..device import cuda_capability, num_sms
from ..spec import LinearSpec
from .layout import ShuffledWeight, kernel_group
from .tiles import Table, table, weights_name


@dataclass(slots=True)
class Prepared:
    weight: ShuffledWeight
    table: Table
    num_sms: int  # multiprocessors of the card


def why_no_layout(spec: LinearSpec) -> str | None:
    """None if the layout holds integers with these groups, else the reason and what would help."""
    if spec.block[0] != 1:
        return f"needs a scale per output feature, not one for {spec.block[0]}"
    if kernel_group(spec.block[1], spec.in_features, spec.bits) is None:
        return f"needs groups in multiples of 16 columns, not {spec.block[1]}; convert with --group-size 64"
    return None


def quantized(weight: QuantizedWeight | Tensor, spec: LinearSpec) -> QuantizedWeight:
    """The weight on spec.device. TypeError for a dense one."""
    if isinstance(weight, Tensor):
        raise TypeError("a dense weight was given to a kernel for quantized ones")
    return weight.to(spec.device)


def prepared(weight: ShuffledWeight, spec: LinearSpec, shipped: Path) -> Prepared:
    """With the card's tiles. shipped: the room's folder of measured tables."""
    name = torch.cuda.get_device_name(spec.device)
    kind = weights_name(spec.kind, spec.bits)
    chosen = table(name, cuda_capability(spec.device), kind, shipped)
    return Prepared(weight, chosen, num_sms(spec.device))


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
    """x [..., K], columns as the checkpoint has them -> [..., N]. Act-order's columns are gathered first."""
    rows = x.reshape(-1, x.shape[-1])
    if prepared.weight.perm is not None:
        rows = rows.index_select(1, prepared.weight.perm)
    return multiply(rows.contiguous(), prepared, bias).view(*x.shape[:-1], -1)


def multiply(x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
    """x [M, K], columns in the weight's order -> [M, N]."""
    from . import launch  # imports Triton, which a machine without a GPU need not have

    weight, chosen = prepared.weight, prepared.table
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, weight.out_features)
    if rows <= chosen.gemv_rows:
        return launch.gemv(x, weight, bias, chosen, prepared.num_sms)
    if rows < chosen.dequantize_rows:
        tile = chosen.tile(rows, weight.group)
        return launch.gemm(x, weight, bias, tile, prepared.num_sms)
    return F.linear(x, launch.dequantize(weight, x.dtype), bias)
