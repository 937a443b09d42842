"""What config.json says of Mamba-2 layers, in the spellings of the families that have them."""

import math
from collections.abc import Sequence
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .base import Mamba2
from .config import FULL, LINEAR, Config

_OLD_TYPES = {"mamba": LINEAR, "attention": FULL}  # of before transformers 5


def mamba2(config: Config, *, heads: int, **sizes: Any) -> Mamba2:
    """sizes: other fields of Mamba2, as the file says."""
    mixer = Mamba2(num_heads=heads, time_step_limit=_time_step_limit(config), **sizes)
    if heads % mixer.num_groups:
        raise CheckpointError(
            f"config.json: {mixer.num_groups} groups cannot serve {heads} Mamba heads"
        )
    return mixer


def expanded(config: Config, **more: Any) -> Mamba2:
    """As Bamba and its cousins say it: all heads together are mamba_expand times as wide as the model."""
    heads, width = config.size("mamba_n_heads", 128), config.size("hidden_size")
    width *= config.size("mamba_expand", 2)
    auto = config.get("mamba_d_head", "auto") == "auto"
    head_dim = max(1, width // heads) if auto else config.size("mamba_d_head")
    if heads * head_dim != width:
        raise CheckpointError(
            f"config.json: {heads} Mamba heads of {head_dim} are not the {width} that mamba_expand asks for"
        )
    return mamba2(
        config,
        heads=heads,
        head_dim=head_dim,
        state_dim=config.size("mamba_d_state", 256),
        num_groups=config.size("mamba_n_groups", 1),
        conv_kernel=config.size("mamba_d_conv", 4),
        conv_bias=config.flag("mamba_conv_bias", True),
        **more,
    )


def layer_types(config: Config, names: Sequence[str], default: list[str], known: Any) -> list[str]:
    """From the first of these fields that the file has: how many there are is up to the caller."""
    found = next((config.get(name) for name in names if config.get(name) is not None), default)
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"config.json: {names[0]} is {str(found)[:80]!r}, want layer types")
    types = [_OLD_TYPES.get(str(kind), kind) for kind in found]
    for kind in types:
        if kind not in known:
            raise UnsupportedError(
                f"config.json: layer type {kind!r} is not supported ({', '.join(known)} are)"
            )
    return types


def _time_step_limit(config: Config) -> tuple[float, float]:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    found = config.get("time_step_limit", (0.0, math.inf))
    bounds = found if isinstance(found, (list, tuple)) else ()
    low, high = (*map(_bound, bounds), math.nan, math.nan)[:2]
    if len(bounds) != 2 or not 0 <= low < high:
        raise CheckpointError(
            f"config.json: time_step_limit is {str(found)[:80]}, want two numbers, the second larger"
        )
    return low, high


def _bound(value: object) -> float:
    if value == {"__float__": "Infinity"}:
        return math.inf
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return min(float(value), math.inf) if number else math.nan  # type: ignore[arg-type]
