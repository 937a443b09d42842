"""Quantizing without calibration: each group's range searched against the weights alone.

The one part of the conversion that the engine may use too (`nibble serve --quantize`), because it needs no samples, no
transformers and no second look at the model.
"""

import torch
from torch import Tensor

from ..scheme import fitting_group
from ..weight import QuantizedWeight
from . import fp8, search


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, min_zero: int = 0
) -> QuantizedWeight | None:
    """A dense weight [out, in] on an integer grid; None where no group of that size or its halves divides the width.

    group_size -1: the whole row. min_zero 1: for GPTQ v1, which cannot hold a zero point of 0.
    """
    size = fitting_group(group_size, weight.shape[1])
    if size is None:
        return None
    return search.quantize(weight.float(), None, bits, size, symmetric, min_zero)


@torch.no_grad()
def quantize_fp8(weight: Tensor) -> QuantizedWeight:
    """A dense weight [out, in] in float8_e4m3fn with a scale per output channel, activations per token."""
    return fp8.quantize(weight)
