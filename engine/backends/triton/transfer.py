"""Numbers on their way to the device, without the host waiting for it."""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (a list or an array) as a tensor there. From pinned memory, so that the stream is not waited for."""
    host = torch.as_tensor(values, dtype=dtype)
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device)
    )
