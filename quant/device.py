"""A device by the name that a user gave, checked before anything is put on it."""

import torch

from ..errors import UserError


def named_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda or cuda:N. Raises UserError where torch has none such here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--device {name}: is no device (give cpu, cuda or one of several such as cuda:1)"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is not supported (cpu and cuda are)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no CUDA GPU here (install a driver and a "
            "CUDA build of torch, or use --device cpu)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0"
        )
    return device
