"""The plain-torch kernels: they implement everything, so every checkpoint runs everywhere, and they are the oracle
that every other kernel is tested against.

`DenseKernel` multiplies by 16- or 32-bit weights. `ReferenceKernel` keeps the codes (two 4-bit codes a byte) and
dequantizes on every call: slow, but it needs the memory of the quantized model alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.weight import QuantizedWeight
from .spec import LinearSpec


class DenseKernel:
    """torch's own product with a dense [out, in] weight."""

    name = "torch-dense"

    def can_implement(self, spec: LinearSpec) -> str | None:
        return None if spec.kind == "dense" else "the weight is quantized"

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Tensor:
        return _dense(weight, spec)

    def apply(self, x: Tensor, prepared: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, prepared, bias)


class ReferenceKernel:
    """y = x dequantize(W)^T for any QuantizedWeight. Activations stay as they are, whatever the format asks."""

    name = "torch-dequantize"

    def can_implement(self, spec: LinearSpec) -> str | None:
        return "the weight is dense" if spec.kind == "dense" else None

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> "PackedWeight":
        return PackedWeight.of(_quantized(weight).to(spec.device))

    def apply(self, x: Tensor, prepared: "PackedWeight", bias: Tensor | None) -> Tensor:
        return F.linear(x, prepared.unpack().dequantize(x.dtype), bias)


class DequantizeOnceKernel:
    """Dequantizes at load and multiplies densely: 16-bit memory and 16-bit speed. For a CPU, where decoding a whole
    weight on every call costs more than reading it."""

    def __init__(self, dense: DenseKernel) -> None:
        self.name, self.dense = f"dequantize-once, {dense.name}", dense

    def can_implement(self, spec: LinearSpec) -> str | None:
        if spec.kind == "dense":
            return "the weight is dense"
        if spec.device.type != "cpu":
            return "would give up the memory that quantization saved"
        return self.dense.can_implement(replace(spec, kind="dense"))

    def prepare(self, weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Tensor:
        return self.dense.prepare(_quantized(weight).dequantize(spec.act_dtype), spec)

    def apply(self, x: Tensor, prepared: Tensor, bias: Tensor | None) -> Tensor:
        return self.dense.apply(x, prepared, bias)


@dataclass(slots=True)
class PackedWeight:
    """A QuantizedWeight whose codes of up to 4 bits lie two a byte, the even column in the low nibble."""

    fields: dict[str, Any]
    codes: Tensor
    paired: bool

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "PackedWeight":
        names = (
            "scales",
            "zeros",
            "mins",
            "perm",
            "kind",
            "bits",
            "table",
            "block",
            "input_scale",
            "act_quant",
        )
        fields = {name: getattr(weight, name) for name in names}
        paired = weight.kind != "fp8" and weight.bits <= 4 and weight.in_features % 2 == 0
        codes = weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4) if paired else weight.codes
        return cls(fields, codes, paired)

    def unpack(self) -> QuantizedWeight:
        codes = self.codes
        if self.paired:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        return QuantizedWeight(codes, **self.fields)


def _quantized(weight: QuantizedWeight | Tensor) -> QuantizedWeight:
    if isinstance(weight, Tensor):
        raise TypeError("a dense weight was given to a kernel for quantized ones")
    return weight


def _dense(weight: QuantizedWeight | Tensor, spec: LinearSpec) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        raise TypeError("a quantized weight was given to a kernel for dense ones")
    return weight.to(device=spec.device, dtype=spec.act_dtype)
