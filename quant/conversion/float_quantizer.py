"""One decoder block in FP8, and what runs through it says of ranges: scales of static activations, of the KV cache.

Invariant: linears that read the same input (q, k, v; gate, up) share one scale where a tensor has only one, because
runtimes fuse them and would round all but the widest anew. Ranges are those of the *quantized* block, and the largest
magnitude met is what a scale maps to 448: what lies beyond would be cut off, and one outlier cut costs more than the
last bit of resolution.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import fp8
from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from . import calibration


class KeyValueRange:
    """Stands in for transformers' cache in one block: keeps no keys and values, only their largest magnitudes. A block
    that does not attend goes without."""

    def __init__(self, attends: bool) -> None:
        self.attends = attends
        self.absmax = {"k": torch.zeros(1), "v": torch.zeros(1)}

    def update(
        self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What an attention layer calls with the states it would cache, rotary embedding applied."""
        for name, states in (("k", keys), ("v", values)):
            self.absmax[name] = torch.maximum(
                self.absmax[name], states.abs().max().float().cpu().reshape(1)
            )
        return keys, values

    def put_into(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A block's arguments with this as its cache, by the name it has there (transformers 5.24 changed it)."""
        if not self.attends:
            return arguments
        return arguments | {"cache" if "cache" in arguments else "past_key_values": self}

    def scales(self, module: str) -> dict[str, Tensor]:
        """float32 [1] each, by the names that compressed-tensors gives them within a block. module: that attends."""
        return {
            f"{module}.{name}_scale": fp8.to_scale(absmax) for name, absmax in self.absmax.items()
        }


def quantize(matrices: list[Tensor], layer: LayerScheme) -> list[QuantizedWeight]:
    """The weights [out_i, in] of linears that read the same input."""
    if layer.strategy != "tensor":
        return [fp8.quantize(matrix, layer.block) for matrix in matrices]
    widest = torch.stack([matrix.abs().max() for matrix in matrices]).max().reshape(1, 1)
    return [fp8.quantize(matrix, (len(matrix), matrix.shape[1]), widest) for matrix in matrices]


def with_static_scales(
    weights: dict[str, QuantizedWeight],
    groups: dict[str, tuple[str, ...]],
    block: nn.Module,
    hidden: Tensor,
    arguments: dict[str, Any],
    at_once: int,
) -> dict[str, QuantizedWeight]:
    """Run a block whose groups (by their first linear) are quantized, and give its weights the range of their inputs.

    hidden [n, T, hidden] becomes the block's outputs, in place.
    """
    absmax = calibration.run_observing(block, hidden, arguments, groups, at_once)
    scales = {
        name: fp8.to_scale(absmax[first_linear]).cpu()
        for first_linear, group in groups.items()
        for name in group
    }
    return {
        name: replace(weight, input_scale=scales[name]) if weight.act_quant == "tensor" else weight
        for name, weight in weights.items()
    }
