"""RMSNorm and rotary position embedding: the layers that hold no big weights."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Rope
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


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): near x while that is small, within +-cap always. None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)


def inverse_frequencies(dim: int, rope: Rope) -> Tensor:
    """Inverse frequencies float32 [dim/2] under a rope's scaling. Raises UnsupportedError for one that is not known."""
    inv_freq = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    parameters = dict(rope.parameters)
    if rope.scaling == "default":
        return inv_freq
    if rope.scaling == "linear":
        return inv_freq / parameters["factor"]
    if rope.scaling == "llama3":
        return _llama3_frequencies(inv_freq, parameters)
    raise UnsupportedError(f"rope scaling {rope.scaling!r} is not supported")


def _llama3_frequencies(inv_freq: Tensor, parameters: dict[str, float]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""
    factor, low, high, context = (
        parameters[name]
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    wavelength = 2 * math.pi / inv_freq
    ramp = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * (1 - ramp) + inv_freq * ramp
