"""The priority list: the first kernel that can, serves. Every refusal on the way has a reason, and `choose` returns
them so that start-up can log which kernel was chosen and why each better one was not.
"""

from dataclasses import dataclass

from .awq.linear import AwqKernel
from .cpu.torch_ops import Int4PackKernel, OneDnnDenseKernel
from .fp4.linear import Fp4Kernel
from .fp8.w8a8 import Fp8W8A8Kernel
from .fp8.w8a16 import Fp8W8A16Kernel
from .gguf.linear import GgufKernel
from .gptq.linear import GptqKernel
from .reference import DenseKernel, DequantizeOnceKernel, ReferenceKernel
from .spec import Kernel, LinearSpec

_ONEDNN, _DENSE = OneDnnDenseKernel(), DenseKernel()

KERNELS: tuple[Kernel, ...] = (
    AwqKernel(),
    GptqKernel(),
    GgufKernel(),
    Fp8W8A8Kernel(),
    Fp8W8A16Kernel(),
    Fp4Kernel(),
    _ONEDNN,
    Int4PackKernel(),
    DequantizeOnceKernel(_ONEDNN),
    DequantizeOnceKernel(_DENSE),
    _DENSE,
    ReferenceKernel(),
)


@dataclass(frozen=True, slots=True)
class Choice:
    kernel: Kernel
    refused: tuple[tuple[str, str], ...]  # (kernel name, reason) of every better one


def choose(spec: LinearSpec) -> Choice:
    """The first kernel of KERNELS that can implement `spec`."""
    refused: list[tuple[str, str]] = []
    for kernel in KERNELS:
        reason = kernel.can_implement(spec)
        if reason is None:
            return Choice(kernel, tuple(refused))
        refused.append((kernel.name, reason))
    raise RuntimeError(f"no kernel for {spec}: the reference kernel refuses nothing")
