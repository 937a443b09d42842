"""Rotary position embedding as data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class LongFactors:
    """What frequencies are divided by instead, at every position of a request that has more tokens than `beyond`
    (Ding et al. 2024, "LongRoPE", section 3.4; as transformers switches): once there is one more, what has been
    computed no longer fits."""

    KIND: ClassVar = "long_factors"
    beyond: int
    factors: tuple[float, ...]  # one a frequency


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
    long: LongFactors | None = None


def switch_of(ropes: Iterable[Rope | None]) -> int | None:
    """Tokens of a request beyond which these ropes have their long factors; None: they have none. UnsupportedError
    where they do not agree."""
    found = {rope.long.beyond for rope in ropes if rope is not None and rope.long is not None}
    if len(found) > 1:
        raise UnsupportedError(f"layers whose LongRoPE switches at {sorted(found)} tokens")
    return next(iter(found), None)
