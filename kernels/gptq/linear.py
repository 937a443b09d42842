"""The linear layer of integer weights on a CUDA device: GEMV, GEMM or dequantize-and-cuBLAS, by the number of rows."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant.weight import QuantizedWeight
from ..spec import LinearSpec
from .layout import ShuffledWeight, kernel_group, shuffle
from .tuning import Table, table, weights_name


@dataclass(slots=True)
class Prepared:
    weight: ShuffledWeight
    table: Table
    processors: int  # multiprocessors of the card


def cuda_capability(device: torch.device) -> int | None:
    """Compute capability as one number, 8.9 is 89; None where torch drives no NVIDIA card."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if this machine runs Triton's kernels on activations of `dtype`, else the reason and what would help."""
    if device.type != "cuda":
        return f"runs on a CUDA device, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'nibble-serve[gpu]'"
    cc = cuda_capability(device)
    if cc is None:
        return "this torch sees no NVIDIA card; install one built for CUDA"
    if cc < 75:
        return f"needs compute capability 7.5, this card has {cc / 10}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit activations, not {dtype}; serve with --dtype float16"
    if dtype == torch.bfloat16 and cc < 80:
        return f"bfloat16 needs compute capability 8.0, this card has {cc / 10}; serve with --dtype float16"
    return None


class TritonIntKernel:
    """2-, 3-, 4- and 8-bit weights, symmetric, asymmetric or with minima; act-order gathers the activations."""

    name = "triton-int"

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind != "int" or spec.bits not in (2, 3, 4, 8):
            return f"needs 2-, 3-, 4- or 8-bit integer weights, not {spec.bits}-bit {spec.kind}"
        if spec.block[0] != 1:
            return f"needs a scale per output feature, not one for {spec.block[0]}"
        if kernel_group(spec.block[1], spec.in_features, spec.bits) is None:
            return f"needs groups in multiples of 16 columns, not {spec.block[1]}; convert with --group-size 64"
        return why_no_triton(spec.device, spec.act_dtype)

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Prepared:
        if isinstance(weight, Tensor):
            raise TypeError("a dense weight was given to a kernel for quantized ones")
        card = torch.cuda.get_device_properties(spec.device)
        chosen = table(card.name, cuda_capability(spec.device), weights_name(spec.kind, spec.bits))
        return Prepared(shuffle(weight.to(spec.device)), chosen, card.multi_processor_count)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if prepared.weight.perm is not None:
            rows = rows.index_select(1, prepared.weight.perm)
        return multiply(rows.contiguous(), prepared, bias).view(*x.shape[:-1], -1)


def multiply(x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
    """x [M, K], columns in the weight's order -> [M, N]."""
    from . import launch  # imports Triton, which a machine without a GPU need not have

    weight, chosen = prepared.weight, prepared.table
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    if x.shape[0] <= chosen.gemv_rows:
        return launch.gemv(x, weight, bias, chosen, prepared.processors)
    if x.shape[0] < chosen.dequantize_rows:
        return launch.gemm(
            x, weight, bias, chosen.tile(x.shape[0], weight.group), prepared.processors
        )
    return F.linear(x, launch.dequantize(weight, x.dtype), bias)
