"""TensorRT Model Optimizer's layouts: FP8 as in fp8.py, NVFP4 as in fp4.py under other names.

weight  float8_e4m3fn [out, in], or uint8 [out, in/2];  weight_scale;  weight_scale_2 float32 [] (NVFP4)
"""

import torch
from torch import Tensor

from ..scheme import LayerScheme
from ..weight import QuantizedWeight
from . import fp4, fp8

SUFFIXES = (*fp8.SUFFIXES, "weight_scale_2")


def read(tensors: dict[str, Tensor], layer: LayerScheme, fmt: str = "modelopt") -> QuantizedWeight:
    """Tensors by suffix -> QuantizedWeight [out, in]. Raises BadTensor."""
    if "weight" in tensors and tensors["weight"].dtype == torch.uint8:
        return fp4.read(tensors["weight"], tensors, layer, "weight")
    return fp8.read(tensors, layer)
