"""LinearSpec and the Kernel protocol.

A kernel declares, a caller chooses: `can_implement(spec)` answers None, or the reason why not in words a user can act
on. `prepare` turns the canonical weight into the kernel's own layout, once, at load; `apply` multiplies.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..quant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a kernel must know to say yes or no."""

    in_features: int
    out_features: int
    kind: str  # "dense", "int", "fp8", "table"
    bits: int
    block: tuple[int, int]
    zero: str  # "mid" (symmetric), "zeros", "mins"
    scale_dtype: (
        torch.dtype
    )  # the narrowest that holds the scales: float16, bfloat16 or float32; dense: the weight's
    permuted: bool
    act_quant: str  # "none", "token", "group", "tensor"
    act_dtype: torch.dtype
    device: torch.device
    table: tuple[int, ...] | None = None  # of kind "table"

    @classmethod
    def of(
        cls, weight: QuantizedWeight | Tensor, act_dtype: torch.dtype, device: torch.device
    ) -> "LinearSpec":
        """Describe a canonical or a dense [out, in] weight."""
        if isinstance(weight, Tensor):
            out_features, in_features = weight.shape
            return cls(
                in_features,
                out_features,
                "dense",
                weight.element_size() * 8,
                (1, in_features),
                "mid",
                weight.dtype,
                False,
                "none",
                act_dtype,
                device,
            )
        zero = "zeros" if weight.zeros is not None else "mins" if weight.mins is not None else "mid"
        return cls(
            weight.in_features,
            weight.out_features,
            weight.kind,
            weight.bits,
            weight.block,
            zero,
            scale_dtype(weight.scales),
            weight.perm is not None,
            weight.act_quant,
            act_dtype,
            device,
            weight.table,
        )


def scale_dtype(scales: Tensor) -> torch.dtype:
    """The narrowest of float16, bfloat16 and float32 that holds every one of these exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if fits(scales, dtype):
            return dtype
    return torch.float32


def fits(scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether dtype holds every one of these exactly."""
    return scales.dtype == dtype or torch.equal(scales.to(dtype).float(), scales.float())


class Kernel(Protocol):
    """One way to compute y = x W^T (+ bias). Stateless: the prepared weight carries everything."""

    name: str

    def can_implement(self, spec: LinearSpec) -> str | None:
        """None if it can, else why not and what would help."""
        ...

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Any:
        """The kernel's own layout of the weight, on spec.device."""
        ...

    def apply(self, x: Tensor, prepared: Any, bias: Tensor | None) -> Tensor:
        """x [..., in_features] in act_dtype -> [..., out_features] in act_dtype."""
        ...
