"""FP8 E4M3 weights with a scale per output channel, per tensor or per block.

Needs no calibration: a floating-point grid is as fine, relative to the value, at every magnitude, so nothing is gained
by clipping and a scale simply maps the largest magnitude it covers to the format's largest, 448 (FP8_DYNAMIC of
llm-compressor; DeepSeek-V3's `act_quant` for blocks). float8_e4m3fn has no infinity; nothing may exceed 448.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scheme import ActQuant
from ..weight import QuantizedWeight

E4M3_MAX = 448.0


def quantize(
    weight: Tensor, block: tuple[int, int] | None = None, absmax: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight [out, in] to float8_e4m3fn codes with float32 scales, one for each block of (rows, columns).

    block None: one row each, a scale per output channel; the shape of the weight: a scale for all of it; the blocks at
    the edges may be partial. absmax, of the shape of the scales: what they cover, where that is more than this weight.
    """
    out_features, in_features = weight.shape
    rows, cols = block or (1, in_features)
    padded = F.pad(weight.float(), (0, -in_features % cols, 0, -out_features % rows))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    if absmax is None:
        absmax = blocks.abs().amax((1, 3))
    scales = to_scale(absmax)
    codes = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(
        codes=codes.reshape(padded.shape)[:out_features, :in_features].contiguous(),
        scales=scales,
        kind="fp8",
        bits=8,
        block=(rows, cols),
        act_quant=_act_quant((rows, cols), (out_features, in_features)),
    )


def _act_quant(block: tuple[int, int], shape: tuple[int, int]) -> ActQuant:
    """How runtimes quantize the activations that meet such a weight."""
    if block[0] == 1:
        return "token"
    return "tensor" if block == shape else "group"


def to_scale(absmax: Tensor) -> Tensor:
    """What maps magnitudes up to absmax onto the format's range; 1 where there is nothing to map."""
    return torch.where(absmax > 0, absmax / E4M3_MAX, torch.ones_like(absmax))
