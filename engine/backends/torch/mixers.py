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
    angles: dict[tuple[Rope | None, int], tuple[Tensor, Tensor]]  # of a rope and a size of heads
    attention: AttentionMetadata
    cache: KVCache


@dataclass(slots=True)
class TorchAttention:
    """qkv -> (norms) -> RoPE -> paged attention -> o"""

    spec: Attention
    qkv: FusedLinear
    o: FusedLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    v_norm: RMSNorm | None
    sinks: Tensor | None  # float32 [num_heads]

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose part of the cache."""
        spec = self.spec
        qkv = self.qkv(h).view(len(h), -1, spec.head_dim)
        if spec.keys_are_values:
            qkv = torch.cat([qkv, qkv[:, spec.num_heads :]], dim=1)
        if any(norm is not None for norm in (self.q_norm, self.k_norm, self.v_norm)):
            qkv = self._normed(qkv)
        rotated = spec.num_heads + (spec.num_kv_heads if spec.kv_source is None else 0)
        apply_rope(qkv[:, :rotated], *step.angles[spec.rope, spec.head_dim])
        if spec.query_scaling is not None:
            factors = position_factors(step.positions, spec.query_scaling)
            qkv[:, : spec.num_heads] *= factors.to(qkv)
        return self.o(paged_attention(qkv, spec, step.cache, layer, step.attention, self.sinks))

    def _normed(self, qkv: Tensor) -> Tensor:
        """[T, heads, head_dim], every kind of head by its norm."""
        spec = self.spec
        heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        parts = qkv.split(heads if spec.kv_source is None else heads[:1], dim=1)
        if spec.qk_norm == "all":
            parts = parts[0].flatten(1), parts[1].flatten(1), parts[2]
        norms = (self.q_norm, self.k_norm, self.v_norm)
        normed = [x if norm is None else norm(x) for x, norm in zip(parts, norms, strict=False)]
        return torch.cat([x.view(len(x), -1, spec.head_dim) for x in normed], dim=1)
