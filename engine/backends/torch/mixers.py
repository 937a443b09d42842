"""Mixers in torch's operators, one class a kind of architectures/base.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....architectures.base import Attention, Rope
from .attention import AttentionMetadata, KVCache, paged_attention
from .layers import RMSNorm, apply_rope, position_factors
from .linear import FusedLinear


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    positions: Tensor  # int64 [T]
    angles: dict[Rope | None, tuple[Tensor, Tensor]]
    attention: AttentionMetadata
    cache: KVCache


@dataclass(slots=True)
class TorchAttention:
    """qkv -> (q, k norm) -> RoPE -> paged attention -> o"""

    spec: Attention
    qkv: FusedLinear
    o: FusedLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Tensor | None  # float32 [num_heads]

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose part of the cache."""
        spec = self.spec
        rotated = spec.num_heads + spec.num_kv_heads
        qkv = self.qkv(h).view(-1, rotated + spec.num_kv_heads, spec.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = qkv.split(
                (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1
            )
            if spec.qk_norm == "all":
                queries, keys = queries.flatten(1), keys.flatten(1)
            normed = self.q_norm(queries), self.k_norm(keys)
            qkv = torch.cat([*(x.view(len(x), -1, spec.head_dim) for x in normed), values], dim=1)
        apply_rope(qkv[:, :rotated], *step.angles[spec.rope])
        if spec.query_scaling is not None:
            factors = position_factors(step.positions, spec.query_scaling)
            qkv[:, : spec.num_heads] *= factors.to(qkv)
        return self.o(paged_attention(qkv, spec, step.cache, layer, step.attention, self.sinks))
