"""Linear: a weight with the kernel that multiplies by it. The model never branches on a format.

Projections that read the same input (q, k, v; gate, up) are stacked into one product wherever their formats agree, and
run one after the other where they do not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....kernels.select import choose
from ....kernels.spec import Kernel, LinearSpec
from ....quant.weight import QuantizedWeight, can_fuse, fuse, scaled_by_row

Weight = QuantizedWeight | Tensor


@dataclass(slots=True)
class _Part:
    kernel: Kernel
    prepared: Any
    bias: Tensor | None


@dataclass(slots=True)
class Linear:
    """y [T, out] = x [T, in] W^T + b, over one part or several whose outputs stand side by side."""

    parts: list[_Part]

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.kernel.apply(x, part.prepared, part.bias)
        return torch.cat(
            [part.kernel.apply(x, part.prepared, part.bias) for part in self.parts], dim=-1
        )

    @classmethod
    def build(
        cls,
        weights: list[Weight],
        biases: list[Tensor | None],
        dtype: torch.dtype,
        device: torch.device,
        report: Callable[[LinearSpec, Any], None] | None = None,
    ) -> "Linear":
        """Prepare `weights` (each [out_i, in]) for their kernels, fused where nothing changes by it.

        `report` hears of each part's spec and Choice.
        """
        parts = []
        for weight, bias in _fused(weights, biases):
            spec = LinearSpec.of(weight, dtype, device)
            choice = choose(spec)
            if report is not None:
                report(spec, choice)
            moved_bias = None if bias is None else bias.to(device=device, dtype=dtype)
            parts.append(_Part(choice.kernel, choice.kernel.prepare(weight, spec), moved_bias))
        return cls(parts)


def _fused(
    weights: list[Weight], biases: list[Tensor | None]
) -> list[tuple[Weight, Tensor | None]]:
    if len(weights) > 1:
        dense = [w for w in weights if isinstance(w, Tensor)]
        quantized = [scaled_by_row(w) for w in weights if isinstance(w, QuantizedWeight)]
        if len(dense) == len(weights):
            return [(torch.cat(dense), _stack_biases(weights, biases))]
        if len(quantized) == len(weights) and can_fuse(quantized):
            return [(fuse(quantized), _stack_biases(weights, biases))]
    return list(zip(weights, biases, strict=True))


def _stack_biases(weights: list[Weight], biases: list[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    rows = [w.shape[0] if isinstance(w, Tensor) else w.out_features for w in weights]
    return torch.cat(
        [
            torch.zeros(n) if bias is None else bias.float()
            for n, bias in zip(rows, biases, strict=True)
        ]
    )
