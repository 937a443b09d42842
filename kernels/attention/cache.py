"""One layer's keys and values in pages, as the package's docstring draws them: what is written, attention reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelArgumentError

FP8 = torch.float8_e4m3fn
_HALVES = (torch.float16, torch.bfloat16)


def form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise KernelArgumentError(problem)


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's keys and values, laid out as the package's docstring draws them. Checked when it is made."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        require(
            keys.dim() == 4 and keys.shape == values.shape and keys.stride() == values.stride(),
            f"keys {form(keys)} and values {form(values)} must have one shape and one layout "
            "[num_kv_heads, num_blocks, block_size, head_dim]",
        )
        require(keys.stride(3) == 1, "the head_dim of the KV cache must be contiguous")
        require(
            keys.dtype == values.dtype and keys.dtype in (*_HALVES, FP8, torch.int8),
            f"KV cache of {keys.dtype} and {values.dtype}: use float16, bfloat16, float8_e4m3fn or int8",
        )
        require(
            16 <= keys.shape[3] <= 256,
            f"head_dim {keys.shape[3]}: attention kernels take 16 to 256",
        )
        self._check_scales()

    def _check_scales(self) -> None:
        scales = [s for s in (self.key_scales, self.value_scales) if s is not None]
        if self.keys.dtype in _HALVES:
            require(not scales, f"a KV cache of {self.keys.dtype} takes no scales")
            return
        require(
            len(scales) == 2, f"a KV cache of {self.keys.dtype} needs key_scales and value_scales"
        )
        k, v = scales
        heads, blocks, size, _ = self.keys.shape
        shapes = [(blocks, size, heads)] + ([(1,)] if self.keys.dtype == FP8 else [])
        require(
            k.dtype == v.dtype == torch.float32
            and k.shape == v.shape
            and tuple(k.shape) in shapes
            and k.stride() == v.stride()
            and k.device == v.device == self.keys.device,
            f"KV scales {form(k)} and {form(v)}: want float32 on {self.keys.device}, of shape "
            + " or ".join(map(str, shapes)),
        )

    @property
    def scales(self) -> str:
        """ "none", "tensor" or "token"."""
        return (
            "none"
            if self.key_scales is None
            else "tensor"
            if self.key_scales.dim() == 1
            else "token"
        )


def allocate_scales(
    num_blocks: int, block_size: int, num_kv_heads: int, device: torch.device
) -> Tensor:
    """float32 zeros [num_blocks, block_size, num_kv_heads], a kv head's blocks after one another in memory."""
    return torch.zeros(num_kv_heads, num_blocks, block_size, device=device).permute(1, 2, 0)
