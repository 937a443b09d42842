"""RMSNorm and rotary position embedding: the layers that hold no big weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import UnsupportedError


@dataclass(slots=True)
class RMSNorm:
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019).

    A float32 weight on 16-bit input asks for the product in float32 (Gemma's 1 + w); otherwise weight and x share
    their dtype.
    """

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


@dataclass(slots=True)
class RopeTable:
    """Cosines and sines of every position, [max_position, dim/2], in the activations' dtype."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(
        cls, inv_freq: Tensor, max_position: int, dtype: torch.dtype, device: torch.device
    ) -> "RopeTable":
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
        return cls(angles.cos().to(device, dtype), angles.sin().to(device, dtype))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, 1, dim/2]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, dim] in place; halves (i, i + dim/2) pair up, as Hugging Face checkpoints have it."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated_first = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)


def inverse_frequencies(dim: int, theta: float, scaling: dict) -> Tensor:
    """Inverse frequencies float32 [dim/2] under the checkpoint's rope_scaling (`linear`, `llama3`, or none).

    Raises UnsupportedError naming any other type.
    """
    inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / float(scaling["factor"])
    if kind == "llama3":
        return _llama3_frequencies(inv_freq, scaling)
    raise UnsupportedError(
        f"config.json: rope_scaling type {kind!r} is not supported (default, linear, llama3 are)"
    )


def _llama3_frequencies(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""
    factor, low, high = (
        float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq
    ramp = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * (1 - ramp) + inv_freq * ramp
