"""The linears of an encoder with what multiplies by them: quantized ones on a CPU by the C++ kernels, others by what
kernels/select.py chooses. The model never branches on a format."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...architectures.encoder import Activation
from ...kernels.cpu import library
from ...kernels.cpu.prepared import PreparedGroup, prepare
from ...quant.weight import QuantizedWeight
from ..backends.base import KernelReport
from ..backends.torch.linear import FusedLinear
from ..backends.weights import Linear
from ..config import EngineConfig

_GROUP = 32  # columns of activations that share a scale

Apply = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[Activation, Apply] = {  # in place: memory that is new each time costs more
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_,
    "tanh": torch.tanh_,
}


@dataclass(slots=True)
class CppLinears:
    """y [T, outputs side by side] of x [T, in], computed in float32."""

    group: PreparedGroup
    pool: library.Pool

    def __call__(self, x: Tensor) -> Tensor:
        return self.group(self.pool, x).to(x.dtype)


@dataclass(slots=True)
class LinearBuilder:
    """Prepares groups of linears for one device and dtype, and remembers what it chose."""

    dtype: torch.dtype
    device: torch.device
    config: EngineConfig
    report: KernelReport
    weight_bytes: int = 0
    _pool: library.Pool | None = None

    def __call__(self, linears: list[Linear]) -> Apply:
        quantized = any(isinstance(linear.weight, QuantizedWeight) for linear in linears)
        if quantized and self._has_cpp:
            return self._cpp(linears)
        for linear in linears:
            weight = linear.weight
            numel = weight.numel() if isinstance(weight, Tensor) else weight.codes.numel()
            bias = 0 if linear.bias is None else linear.bias.numel()
            self.weight_bytes += (numel + bias) * self.dtype.itemsize  # of a quantized one, at most
        return FusedLinear.build(linears, self.dtype, self.device, self.report)

    @property
    def _has_cpp(self) -> bool:
        on_cpu = self.device.type == "cpu" and self.config.cpu_isa != "none"
        return on_cpu and library.why_missing() is None

    def _cpp(self, linears: list[Linear]) -> Apply:
        if self._pool is None:
            threads = self.config.num_threads or torch.get_num_threads()
            self._pool = library.Pool(threads, self.config.cpu_isa)
        int8 = self.config.cpu_activations == "int8"
        prepared = [prepare(_finer(linear.weight), linear.bias) for linear in linears]
        for each in prepared:
            self.report.used[f"cpu-{self._pool.isa} {each.describe(int8)}"] += 1
            self.weight_bytes += each.nbytes + (0 if each.bias is None else each.bias.nbytes)
        return CppLinears(PreparedGroup(prepared, int8), self._pool)


def _finer(weight: QuantizedWeight | Tensor) -> QuantizedWeight | Tensor:
    """The same weight, its scales said for every _GROUP columns: the kernels quantize activations by the weight's
    groups, and what stands out in a few columns of an encoder's costs the others of their group their bits."""
    if isinstance(weight, Tensor) or weight.kind != "int" or weight.block[0] != 1:
        return weight
    width = min(weight.block[1], weight.in_features)
    if width <= _GROUP or width % _GROUP:
        return weight

    groups = torch.arange(0, weight.in_features, _GROUP) // width
    zeros, mins = (None if v is None else v[:, groups] for v in (weight.zeros, weight.mins))
    scales = weight.scales[:, groups]
    return replace(weight, scales=scales, zeros=zeros, mins=mins, block=(1, _GROUP))
