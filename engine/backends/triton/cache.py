"""What the layers of a Triton decoder keep of requests: keys and values, or latents, in blocks; recurrent states in
slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....architectures.base import Attention, LatentAttention, LayerSpec
from ....kernels.attention.cache import PagedCache, allocate_scales
from ...config import EngineConfig
from ..torch.states import StateCache

_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class TritonCache:
    """Keys and values of each layer that attends, [num_kv_heads, num_blocks, block_size, head_dim]; in 8 bits with a
    float32 scale for each token and head. Layers that read another's share it. Latents [num_blocks, block_size, kv_rank
    + rope_dim]. States as torch's StateCache has them."""

    layers: dict[int, PagedCache]
    latents: dict[int, Tensor]
    states: StateCache
    groups: dict[int, int]  # KV group of each layer that has keys and values, or latents
    num_groups: int
    block_size: int

    @classmethod
    def allocate(
        cls,
        specs: list[LayerSpec],
        groups: dict[int, int],
        num_blocks: Sequence[int],
        num_states: int,
        config: EngineConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "TritonCache":
        """groups: of layers; num_blocks: of each group."""
        layers: dict[int, PagedCache] = {}
        latents: dict[int, Tensor] = {}
        for index, spec in enumerate(specs):
            if isinstance(mixer := spec.mixer, LatentAttention):
                shape = num_blocks[groups[index]], config.block_size, mixer.kv_rank + mixer.rope_dim
                latents[index] = torch.zeros(shape, dtype=dtype, device=device)
            elif isinstance(mixer, Attention) and mixer.kv_source is not None:
                layers[index] = layers[mixer.kv_source]
            elif isinstance(mixer, Attention):
                layers[index] = _pages(mixer, num_blocks[groups[index]], config, dtype, device)
        states = StateCache.allocate(specs, num_states, device)
        return cls(layers, latents, states, groups, len(num_blocks), config.block_size)

    def clear(self, blocks: Sequence[list[int]], state_slot: int | None) -> None:
        """Nothing: the kernels never read behind a request's last token, nor a state that it has not written."""


def _pages(
    mixer: Attention,
    num_blocks: int,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedCache:
    stored = _DTYPES.get(config.kv_cache_dtype, dtype)
    bits8 = stored.itemsize == 1
    shape = (2, mixer.num_kv_heads, num_blocks, config.block_size, mixer.head_dim)
    zeros = torch.zeros(shape, dtype=torch.uint8 if bits8 else stored, device=device)
    keys, values = zeros.view(stored)
    scales = [
        allocate_scales(num_blocks, config.block_size, mixer.num_kv_heads, device)
        if bits8
        else None
        for _ in range(2)
    ]
    return PagedCache(keys, values, *scales)
