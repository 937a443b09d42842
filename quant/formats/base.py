"""What the formats share: the error for a tensor that does not fit, and the checks that raise it."""

import torch
from torch import Tensor


class BadTensor(ValueError):
    """A tensor of a module is missing, has the wrong shape or dtype, or impossible values."""

    def __init__(self, suffix: str, problem: str):
        super().__init__(f"{suffix} {problem}")
        self.suffix, self.problem = suffix, problem


def need(tensors: dict[str, Tensor], suffix: str, ndim: int | None = None) -> Tensor:
    """The tensor of that suffix; BadTensor if it is missing or has another number of dimensions."""
    if suffix not in tensors:
        raise BadTensor(suffix, "is missing")
    tensor = tensors[suffix]
    if ndim is not None and tensor.ndim != ndim:
        raise BadTensor(suffix, f"has shape {list(tensor.shape)}, want {ndim} dimensions")
    return tensor


def check_shape(suffix: str, tensor: Tensor, want: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != want:
        raise BadTensor(suffix, f"has shape {list(tensor.shape)}, want {list(want)}")


def check_dtype(suffix: str, tensor: Tensor, *want: torch.dtype) -> None:
    if tensor.dtype not in want:
        raise BadTensor(suffix, f"has dtype {tensor.dtype}, want {' or '.join(map(str, want))}")


def check_finite(suffix: str, tensor: Tensor) -> Tensor:
    """The tensor itself; BadTensor if it holds NaN or infinity."""
    if tensor.numel() and tensor.is_floating_point():
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        if not torch.isfinite(torch.stack(torch.aminmax(wide))).all():
            raise BadTensor(suffix, "holds NaN or infinity")
    return tensor
