"""Mixers in torch's operators, one class a kind of architectures/base.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import (
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    Rope,
    ShortConv,
)
from ..weights import Mamba2Weights
from . import delta_rule, state_space
from .attention import AttentionMetadata, KVCache, paged_attention
from .latent_attention import latent_attention
from .layers import RMSNorm, apply_rope, position_factors
from .linear import FusedLinear
from .states import StateCache, StateStep, carry, convolve


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    positions: Tensor  # int64 [T]
    angles: dict[tuple[Rope | None, int], tuple[Tensor, Tensor]]  # of a rope and a size of heads
    attention: dict[int, AttentionMetadata]  # of each KV group
    cache: KVCache
    states: StateStep | None  # None: no layer has any
    state_cache: StateCache

    def attention_of(self, layer: int) -> AttentionMetadata:
        return self.attention[self.cache.groups[layer]]


@dataclass(slots=True)
class TorchAttention:
    """qkv -> (norms) -> RoPE -> paged attention -> (gate) -> o"""

    spec: Attention
    qkv: FusedLinear
    o: FusedLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    v_norm: RMSNorm | None
    sinks: Tensor | None  # float32 [num_heads]
    head_gate: FusedLinear | None  # hidden -> num_heads

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose part of the cache."""
        spec = self.spec
        qkv, gate = self.qkv(h), None
        if spec.output_gate == "gate_proj":
            qkv, gate = qkv.tensor_split((-spec.num_heads * spec.head_dim,), dim=1)
        elif spec.output_gate is not None:
            qkv, gate = self._split_gate(qkv)
        qkv = qkv.reshape(len(h), -1, spec.head_dim)
        if spec.keys_are_values:
            qkv = torch.cat([qkv, qkv[:, spec.num_heads :]], dim=1)
        if any(norm is not None for norm in (self.q_norm, self.k_norm, self.v_norm)):
            qkv = self._normed(qkv)
        rotated = spec.num_heads + (spec.num_kv_heads if spec.kv_source is None else 0)
        interleaved = spec.rope is not None and spec.rope.interleaved
        apply_rope(qkv[:, :rotated], *step.angles[spec.rotation], interleaved)
        if spec.query_scaling is not None:
            factors = position_factors(step.positions, spec.query_scaling)
            qkv[:, : spec.num_heads] *= factors.to(qkv)
        mixed = paged_attention(qkv, spec, step.cache, layer, step.attention_of(layer), self.sinks)
        if self.head_gate is not None:
            gate = self.head_gate(h).repeat_interleave(spec.head_dim, 1)
        return self.o(mixed if gate is None else mixed * gate.sigmoid())

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

    def _split_gate(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[T, heads of [query | gate], keys, values] -> [T, queries, keys, values], gates [T, num_heads * head_dim]"""
        spec = self.spec
        queries, others = qkv.tensor_split((2 * spec.num_heads * spec.head_dim,), dim=1)
        query, gate = queries.view(len(qkv), spec.num_heads, 2, spec.head_dim).unbind(2)
        return torch.cat((query.flatten(1), others), 1), gate.flatten(1)


@dataclass(slots=True)
class TorchLatentAttention:
    """q_a -> norm -> q_b -> RoPE; kv_a -> norm, RoPE -> latents in the cache; attention over them -> o"""

    spec: LatentAttention
    inputs: FusedLinear  # q or q_a, kv_a
    q_b: FusedLinear | None
    # [num_heads, nope_dim + value_dim, kv_rank], dequantized: it is multiplied from both sides
    kv_b: Tensor
    kv_bias: Tensor | None  # [num_heads, nope_dim + value_dim]
    o: FusedLinear
    q_norm: RMSNorm | None
    kv_norm: RMSNorm

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose part of the cache."""
        spec = self.spec
        sizes = (spec.kv_rank, spec.rope_dim)
        found = self.inputs(h)
        q, latents, turned = found.split((found.shape[1] - sum(sizes), *sizes), dim=1)
        if self.q_b is not None and self.q_norm is not None:
            q = self.q_b(self.q_norm(q))
        q = q.reshape(len(h), spec.num_heads, spec.head_dim)
        seen = torch.cat((self.kv_norm(latents), turned), dim=1)
        for each in (q[..., spec.nope_dim :], seen[:, None, spec.kv_rank :]):
            apply_rope(each, *step.angles[spec.rotation], spec.rope.interleaved)
        if spec.query_scaling is not None:
            q = q * position_factors(step.positions, spec.query_scaling).to(q)
        mixed = latent_attention(
            q, seen, self.kv_b, self.kv_bias, spec, step.cache, layer, step.attention_of(layer)
        )
        return self.o(mixed)


@dataclass(slots=True)
class TorchGatedDeltaNet:
    """qkv -> convolution, silu -> gated delta rule -> norm -> times silu(z) -> out; in float32 between linears"""

    spec: GatedDeltaNet
    qkv_z: FusedLinear
    b_a: FusedLinear
    out: FusedLinear
    taps: Tensor  # float32 [conv_kernel, channels], oldest first
    rate: Tensor  # float32 [num_value_heads]: -exp(A_log)
    dt_bias: Tensor  # float32 [num_value_heads]
    norm: RMSNorm  # float32 [value_dim]

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose states."""
        spec = self.spec
        qkv, z = self.qkv_z(h).tensor_split((spec.channels,), dim=1)
        b, a = self.b_a(h).float().chunk(2, dim=1)
        decay, beta = self.rate * F.softplus(a + self.dt_bias), b.sigmoid()
        if step.states is None:
            raise ValueError("a step without the states of a layer that has one")
        inputs, matrices = step.state_cache.layers[layer]
        q, k, v = self._heads(F.silu(convolve(qkv.float(), self.taps, step.states, inputs)))
        inputs_of_rule = (q, k, v, decay, beta)
        mixed = carry(
            delta_rule.recurrent_step, delta_rule.chunked, inputs_of_rule, step.states, matrices
        )
        mixed = self.norm(mixed)
        return self.out((mixed.flatten(1) * F.silu(z.float())).to(h.dtype))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, channels] -> q, k [N, num_value_heads, key_dim], v [N, num_value_heads, value_dim]"""
        spec = self.spec
        keys = spec.num_key_heads * spec.key_dim
        q, k, v = qkv.split((keys, keys, spec.num_value_heads * spec.value_dim), dim=1)
        shared = spec.num_value_heads // spec.num_key_heads
        q, k = (
            _unit(x.view(len(x), -1, spec.key_dim)).repeat_interleave(shared, 1) for x in (q, k)
        )
        return q * spec.key_dim**-0.5, k, v.view(len(v), -1, spec.value_dim)


@dataclass(slots=True)
class TorchMamba2:
    """x, B, C -> convolution, silu -> state space -> times silu(z) -> norm -> out; in float32 between linears"""

    spec: Mamba2
    inputs: FusedLinear
    out: FusedLinear
    weights: Mamba2Weights
    eps: float

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose states."""
        spec, own = self.spec, self.weights
        sizes = (spec.values, spec.channels, spec.num_heads)
        z, xbc, dt = self.inputs(h).float().split(sizes, dim=1)
        if step.states is None:
            raise ValueError("a step without the states of a layer that has one")
        earlier, matrices = step.state_cache.layers[layer]
        xbc = convolve(xbc, own.taps, step.states, earlier)
        x, b, c = self._heads(F.silu(xbc if own.bias is None else xbc + own.bias))
        dt = F.softplus(dt + own.dt_bias).clamp(*spec.time_step_limit)
        inputs = (b, c, dt[..., None] * x, own.rate * dt)
        y = carry(state_space.recurrent_step, state_space.chunked, inputs, step.states, matrices)
        y = (y + own.skip[:, None] * x).flatten(1) * F.silu(z)
        groups = y.view(len(y), spec.num_groups, -1)
        normed = F.rms_norm(groups, groups.shape[2:], eps=self.eps).flatten(1) * own.norm
        return self.out(normed.to(h.dtype))

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, channels] -> x [T, num_heads, head_dim], B and C [T, num_heads, state_dim]"""
        spec, shared = self.spec, self.spec.num_heads // self.spec.num_groups
        x, *both = xbc.split((spec.values, *[spec.num_groups * spec.state_dim] * 2), dim=1)
        b, c = (
            each.view(len(each), -1, spec.state_dim).repeat_interleave(shared, 1) for each in both
        )
        return x.view(len(x), -1, spec.head_dim), b, c


@dataclass(slots=True)
class TorchShortConv:
    """B, C, x -> C * conv(B * x) -> out; in float32 between linears"""

    spec: ShortConv
    inputs: FusedLinear
    out: FusedLinear
    taps: Tensor  # float32 [conv_kernel, channels], oldest first
    bias: Tensor | None  # float32 [channels]

    def __call__(self, h: Tensor, layer: int, step: Step) -> Tensor:
        """h [T, hidden], normed; layer: whose states."""
        if step.states is None:
            raise ValueError("a step without the states of a layer that has one")
        before, after, x = self.inputs(h).float().chunk(3, dim=1)
        mixed = convolve(before * x, self.taps, step.states, step.state_cache.layers[layer][0])
        if self.bias is not None:
            mixed = mixed + self.bias
        return self.out((after * mixed).to(h.dtype))


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


TorchMixer = (
    TorchAttention | TorchLatentAttention | TorchGatedDeltaNet | TorchMamba2 | TorchShortConv
)
