"""FusedLinear: the linears of a group with the kernels that multiply by them. The decoder never branches on a format.

They are stacked into one product wherever their formats agree, and run one after the other where they do not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.select import choose
from ....kernels.spec import Kernel, LinearSpec
from ....quant.weight import QuantizedWeight, can_fuse, fuse, scaled_by_row
from ..base import KernelReport
from ..weights import Linear


@dataclass(slots=True)
class _Product:
    kernel: Kernel
    prepared: Any
    bias: Tensor | None


@dataclass(slots=True)
class FusedLinear:
    """y [T, out] = x [T, in] W^T + b, the outputs of one product or several side by side."""

    products: list[_Product]

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [
            product.kernel.apply(x, product.prepared, product.bias) for product in self.products
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @classmethod
    def build(
        cls,
        linears: list[Linear],
        dtype: torch.dtype,
        device: torch.device,
        report: KernelReport | None = None,
    ) -> "FusedLinear":
        """Prepare the linears of a group for their kernels, fused where nothing changes by it."""
        products = []
        for linear in _fused(linears):
            spec = LinearSpec.of(linear.weight, dtype, device)
            choice = choose(spec)
            if report is not None:
                report.add(spec, choice)
            bias = None if linear.bias is None else linear.bias.to(device=device, dtype=dtype)
            products.append(
                _Product(choice.kernel, choice.kernel.prepare(linear.weight, spec), bias)
            )
        return cls(products)


def _fused(linears: list[Linear]) -> list[Linear]:
    if len(linears) == 1:
        return linears
    weights = [linear.weight for linear in linears]
    dense = [w for w in weights if isinstance(w, Tensor)]
    quantized = [scaled_by_row(w) for w in weights if isinstance(w, QuantizedWeight)]
    if len(dense) == len(weights):
        return [Linear(torch.cat(dense), _stacked_bias(linears))]
    if len(quantized) == len(weights) and can_fuse(quantized):
        return [Linear(fuse(quantized), _stacked_bias(linears))]
    return linears


def _stacked_bias(linears: list[Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([_bias(linear) for linear in linears])


def _bias(linear: Linear) -> Tensor:
    if linear.bias is not None:
        return linear.bias.float()
    weight = linear.weight
    return torch.zeros(len(weight) if isinstance(weight, Tensor) else weight.out_features)
