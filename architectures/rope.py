"""Rotary position embedding as data."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: halves (i, i + dim/2) of the rotated part of a head pair up, as most Hugging Face
    checkpoints have it, or neighbours (2 i, 2 i + 1)."""

    KIND: ClassVar = "rope"
    theta: float
    scaling: str = "default"  # rope_type in config.json
    parameters: tuple[tuple[str, float], ...] = field(
        default=(), metadata={"role": "detail"}
    )  # of the scaling
    dim: int | None = None  # dimensions of a head that turn, the first; None: all
    attention_factor: float = 1.0  # of cosines and sines
    interleaved: bool = False  # neighbours pair up
