"""On-disk formats: pure functions between the tensors of one module and its QuantizedWeight.

Each safetensors format is a module with `SUFFIXES` (the tensor names it may have under a module, weights first),
`read(tensors, layer, fmt) -> QuantizedWeight` and `write(weight, ...) -> tensors`. A tensor that does not fit raises
BadTensor, which the checkpoint turns into an error that names the file.
"""

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from .base import BadTensor as BadTensor


def by_method(method: str) -> ModuleType:
    """The format module for a `quant_method`."""
    from . import awq, compressed_tensors, fp8, gptq

    return {"awq": awq, "gptq": gptq, "fp8": fp8, "compressed-tensors": compressed_tensors}[method]


def is_quantized(tensors: Mapping[str, torch.dtype]) -> bool:
    """Whether these suffixes and dtypes are a quantized weight; a lone 16 or 32 bit `weight` is a dense one."""
    dtype = tensors.get("weight")
    return dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


__all__ = ["BadTensor", "Tensor", "by_method", "is_quantized"]
