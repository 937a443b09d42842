"""What the formats share: the error for a tensor that does not fit, and the checks that raise it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..weight import QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT16_MAX = 65504.0
DENSE = (*FLOATS, torch.float64)


class BadTensor(ValueError):
    """A tensor of a module is missing, has the wrong shape or dtype, or impossible values."""

    def __init__(self, suffix: str, problem: str):
        super().__init__(f"{suffix} {problem}")
        self.suffix, self.problem = suffix, problem


def is_quantized(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether a module with these tensors (suffix -> dtype) is quantized: it has more than a 16 or 32 bit `weight`."""
    return dtypes.get("weight") not in DENSE


def need(tensors: dict[str, Tensor], suffix: str, *dtypes: torch.dtype, ndim: int = 2) -> Tensor:
    """The tensor of that suffix; BadTensor if missing, not finite, or of another dtype or number of dimensions."""
    if suffix not in tensors:
        raise BadTensor(suffix, "is missing")
    tensor = tensors[suffix]
    if tensor.dtype not in dtypes:
        raise BadTensor(suffix, f"has dtype {tensor.dtype}, want {' or '.join(map(str, dtypes))}")
    if tensor.ndim != ndim:
        raise BadTensor(suffix, f"has shape {list(tensor.shape)}, want {ndim} dimensions")
    return check_finite(suffix, tensor)


def check_shape(suffix: str, tensor: Tensor, *want: int) -> None:
    """BadTensor unless the tensor has exactly this shape."""
    if tuple(tensor.shape) != want:
        raise BadTensor(suffix, f"has shape {list(tensor.shape)}, want {list(want)}")


def check_finite(suffix: str, tensor: Tensor) -> Tensor:
    """The tensor itself; BadTensor if it holds NaN or infinity (float8_e4m3fn has NaN only)."""
    if tensor.dtype == torch.float8_e4m3fn:
        bad = bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    elif tensor.is_floating_point() and tensor.numel():
        bad = not torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
    else:
        bad = False
    if bad:
        raise BadTensor(suffix, "holds NaN or infinity")
    return tensor


def check_scales(suffix: str, weight: QuantizedWeight) -> None:
    """BadTensor for scales that no tool gives a weight that was trained.

    A few zeros are rows without a weight; integers on a symmetric grid may have scales of either sign, as Q4_0's have,
    but not all of them below zero.
    """
    scales = weight.scales.float()
    low, high = (float(value) for value in torch.aminmax(scales))
    if max(-low, high) >= _FLOAT16_MAX:
        raise BadTensor(suffix, f"reaches {max(-low, high):g}, where float16 ends")
    if low > 0:
        return
    if int((scales == 0).sum()) * 2 > scales.numel():
        raise BadTensor(suffix, "is zero for most of its groups")
    if low < 0 and (weight.kind != "int" or (high < 0 and scales.numel() > 8)):
        raise BadTensor(suffix, f"is negative ({low:g})")


def columns_per_group(suffix: str, in_features: int, n_groups: int, configured: int) -> int:
    """Columns that share a scale when there are n_groups of them.

    The configured size where it fits (the last group may be partial), else what the shape implies: single layers may
    deviate from the config.
    """
    size = in_features if configured == -1 else configured
    if -(-in_features // size) == n_groups:
        return min(size, in_features)
    if n_groups and in_features % n_groups == 0:
        return in_features // n_groups
    raise BadTensor(
        suffix,
        f"has {n_groups} groups, which do not divide {in_features} input features (group_size "
        f"{configured})",
    )


def order_of_groups(
    g_idx: Tensor, in_features: int, n_groups: int, suffix: str
) -> tuple[Tensor | None, int]:
    """GPTQ's group of each input feature, int32 [in] -> (perm that makes groups contiguous or None, group size)."""
    check_shape(suffix, g_idx, in_features)
    groups = g_idx.long()
    if groups.min() < 0 or groups.max() >= n_groups:
        raise BadTensor(
            suffix,
            f"names group {int(groups.max() if groups.min() >= 0 else groups.min())}, but there "
            f"are {n_groups}",
        )
    counts = torch.bincount(groups, minlength=n_groups)
    size = int(counts[0])
    if (counts[:-1] != size).any() or not 0 < counts[-1] <= size:
        raise BadTensor(
            suffix,
            f"gives its {n_groups} groups unequal sizes ({int(counts.min())} to "
            f"{int(counts.max())})",
        )
    if torch.equal(groups, torch.arange(in_features) // size):
        return None, size
    return torch.argsort(groups, stable=True), size


def to_half(scales: Tensor) -> Tensor:
    """Scales as float16. Raises ValueError if that would change one: quantize with float16 scales instead."""
    half = scales.to(torch.float16)
    if not torch.equal(half.float(), scales.float()):
        raise ValueError("the scales do not fit float16, which this format stores")
    return half


def refuse(
    weight: QuantizedWeight, name: str, bits: tuple[int, ...] = (), perm: bool = False
) -> None:
    """ValueError unless the format can hold the weight: integer, of these bits, one row per scale, no float minimum."""
    reasons = {
        f"{weight.kind} weights": weight.kind != "int",
        f"{weight.bits} bits": weight.bits not in bits,
        "float minimums (requantize)": weight.mins is not None,
        "a column order": weight.perm is not None and not perm,
        f"blocks of {weight.block}": weight.block[0] != 1,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        raise ValueError(f"{name} cannot hold {reason}")
