"""Mixers in torch's operators, one class a kind of architectures/base.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Attention, GatedDeltaNet, LatentAttention, Rope, ShortConv
from .attention import AttentionMetadata, KVCache, paged_attention
from .delta_rule import chunked, recurrent_step
from .latent_attention import latent_attention
from .layers import RMSNorm, apply_rope, position_factors
from .linear import FusedLinear
from .states import StateCache, StateStep, convolve, read


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    positions: Tensor  # int64 [T]
    angles: dict[tuple[Rope | None, int], tuple[Tensor, Tensor]]  # of a rope and a size of heads
    attention: AttentionMetadata
    cache: KVCache
    states: StateStep | None  # None: no layer has any
    state_cache: StateCache


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
        mixed = paged_attention(qkv, spec, step.cache, layer, step.attention, self.sinks)
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
            q, seen, self.kv_b, self.kv_bias, spec, step.cache, layer, step.attention
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
        mixed = self.norm(_delta_rule(q, k, v, decay, beta, step.states, matrices))
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


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, step: StateStep, states: Tensor
) -> Tensor:
    """[T, heads, ...] each -> [T, heads, value_dim]; the slots go on."""
    outputs, count = [], step.num_decodes
    if count:
        state = states[step.reads].masked_fill_(step.fresh.view(-1, 1, 1, 1), 0)
        output, state = recurrent_step(
            q[:count], k[:count], v[:count], g[:count], beta[:count], state
        )
        states[step.writes] = state[step.written]
        outputs.append(output)
    for piece in step.pieces:
        rows, before = piece.rows, read(states, piece)
        output, state = chunked(q[rows], k[rows], v[rows], g[rows], beta[rows], before)
        for slot in piece.writes:
            states[slot] = state
        outputs.append(output)
    return torch.cat(outputs)


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


TorchMixer = TorchAttention | TorchLatentAttention | TorchGatedDeltaNet | TorchShortConv
