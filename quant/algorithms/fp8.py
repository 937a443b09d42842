"""FP8 E4M3 weights with one scale per output channel; activations are quantized per token at run time.

Needs no calibration: a floating-point grid is as fine, relative to the value, at every magnitude, so nothing is gained
by clipping and the scale simply maps each row's largest magnitude to the format's largest, 448 (FP8_DYNAMIC of
llm-compressor, compressed-tensors "float-quantized"). float8_e4m3fn has no infinity; nothing may exceed 448.
"""

import torch
from torch import Tensor

from ..weight import QuantizedWeight

E4M3_MAX = 448.0


def quantize(weight: Tensor) -> QuantizedWeight:
    """Round a weight [out, in] to float8_e4m3fn codes with float32 scales [out, 1]."""
    weight = weight.float()
    absmax = weight.abs().amax(1, keepdim=True)
    scales = torch.where(absmax > 0, absmax / E4M3_MAX, torch.ones_like(absmax))
    codes = (weight / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(codes=codes, scales=scales, kind="fp8", bits=8, block=(1, weight.shape[1]),
                           act_quant="token")
