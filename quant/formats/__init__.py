"""On-disk formats: pure functions between the tensors of one module and its QuantizedWeight.

Each safetensors format is a module with `SUFFIXES` (the tensor names it may have under a module),
`read(tensors, layer, fmt) -> QuantizedWeight` and, but for HQQ, `write(weight, fmt) -> tensors`; fmt is the scheme's
`format`.
A tensor that does not fit raises BadTensor, which the checkpoint turns into an error that names the file; a weight that
a format cannot hold exactly is a ValueError.
"""

from collections.abc import Mapping
from types import ModuleType

import torch

from . import awq, compressed_tensors, fp8, gptq, hqq
from .base import BadTensor

_BY_METHOD = {
    "awq": awq,
    "gptq": gptq,
    "fp8": fp8,
    "compressed-tensors": compressed_tensors,
    "hqq": hqq,
}
_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def by_method(method: str) -> ModuleType:
    """The format module of a `quant_method` of safetensors checkpoints."""
    return _BY_METHOD[method]


def is_quantized(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether a module with these tensors (suffix -> dtype) is quantized: it has more than a 16 or 32 bit `weight`."""
    return dtypes.get("weight") not in _DENSE


__all__ = ["BadTensor", "by_method", "is_quantized"]
