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
    """Cosines and sines of every position, [max_position, rotated dims / 2], in the activations' dtype."""

    cos: Tensor
    sin: Tensor
    long: "RopeTable | None" = None  # of requests that have Rope.long's factors

    @classmethod
    def build(
        cls,
        head_dim: int,
        rope: Rope | None,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "RopeTable":
        """rope None: nothing turns, cosines are 1."""
        positions = torch.arange(max_position, dtype=torch.float32)
        factor = 1.0 if rope is None else rope.attention_factor

        def table(long: bool) -> "RopeTable":
            angles = torch.outer(positions, inverse_frequencies(head_dim, rope, long))
            cos, sin = angles.cos() * factor, angles.sin() * factor
            return cls(cos.to(device, dtype), sin.to(device, dtype))

        found = table(False)
        if rope is not None and rope.long is not None:
            found.long = table(True)
        return found

    def at(self, positions: Tensor, long: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, 1, dim/2]. long [T]: of whose tokens the factors are the long ones."""
        cos, sin = self.cos[positions], self.sin[positions]
        if self.long is not None and long is not None:
            cos = torch.where(long[:, None], self.long.cos[positions], cos)
            sin = torch.where(long[:, None], self.long.sin[positions], sin)
        return cos.unsqueeze(1), sin.unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> None:
    """Rotate x [T, heads, dim] in place, or its first dimensions where cos has fewer; halves (i, i + dim/2) pair up, as
    most Hugging Face checkpoints have it, or neighbours."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    if interleaved:
        first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    rotated_first = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): near x while that is small, within +-cap always. None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)


def position_factors(positions: Tensor, scaling: tuple[float, int]) -> Tensor:
    """Attention.query_scaling of positions [T] -> [T, 1, 1]"""
    beta, length = scaling
    return (1 + beta * torch.log1p((positions // length).float())).view(-1, 1, 1)


def inverse_frequencies(head_dim: int, rope: Rope | None, long: bool = False) -> Tensor:
    """Inverse frequencies float32 [rotated dims / 2] under a rope's scaling, or by its long factors; zeros where there
    is none. Raises UnsupportedError for a scaling that is not known."""
    if rope is None:
        return torch.zeros(head_dim // 2)
    if rope.scaling == "proportional":
        return _proportional_frequencies(rope.theta, head_dim, dict(rope.parameters))
    dim = rope.dim or head_dim
    inv_freq = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if long and rope.long is not None:
        return inv_freq / torch.tensor(rope.long.factors)
    parameters = dict(rope.parameters)
    if rope.scaling == "default":
        return inv_freq
    if rope.scaling == "longrope":
        return inv_freq / torch.tensor(list(parameters.values()))
    if rope.scaling == "linear":
        return inv_freq / parameters["factor"]
    if rope.scaling == "llama3":
        return _llama3_frequencies(inv_freq, parameters)
    if rope.scaling == "yarn":
        return _yarn_frequencies(inv_freq, rope.theta, parameters)
    raise UnsupportedError(f"rope scaling {rope.scaling!r} is not supported")


def _proportional_frequencies(theta: float, dim: int, parameters: dict[str, float]) -> Tensor:
    """Gemma 4's: as fast as if all of the head turned, but only the first share of the pairs does."""
    turning = int(parameters["share"] * dim // 2)
    inv_freq = theta ** -(torch.arange(0, 2 * turning, 2, dtype=torch.int64).float() / dim)
    return F.pad(inv_freq, (0, dim // 2 - turning)) / parameters["factor"]


def _yarn_frequencies(inv_freq: Tensor, theta: float, parameters: dict[str, float]) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): dimensions that turn fewer than beta_slow times in the original context
    are divided by `factor`, those that turn more than beta_fast times kept, a ramp over dimensions between."""
    dim, context = 2 * len(inv_freq), parameters["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters["beta_fast"]), dimension(parameters["beta_slow"])
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = torch.arange(len(inv_freq), dtype=torch.float32)
    ramp = ((steps - low) / (high - low or 0.001)).clamp(0, 1)
    return inv_freq / parameters["factor"] * ramp + inv_freq * (1 - ramp)


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
