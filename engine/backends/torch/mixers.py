"""Mixers in torch's operators, one class a kind of architectures/base.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Attention, GatedDeltaNet, Rope
from .attention import AttentionMetadata, KVCache, paged_attention
from .delta_rule import chunked, recurrent_step
from .layers import RMSNorm, apply_rope, position_factors
from .linear import FusedLinear
from .states import StateCache, StateStep


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
        if spec.output_gate:
            qkv, gate = self._split_gate(qkv)
        qkv = qkv.view(len(h), -1, spec.head_dim)
        if spec.keys_are_values:
            qkv = torch.cat([qkv, qkv[:, spec.num_heads :]], dim=1)
        if any(norm is not None for norm in (self.q_norm, self.k_norm, self.v_norm)):
            qkv = self._normed(qkv)
        rotated = spec.num_heads + (spec.num_kv_heads if spec.kv_source is None else 0)
        apply_rope(qkv[:, :rotated], *step.angles[spec.rope, spec.head_dim])
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
        mixed = self._mix(qkv.float(), decay, beta, step.states, step.state_cache.layers[layer])
        mixed = self.norm(mixed).flatten(1) * F.silu(z.float())
        return self.out(mixed.to(h.dtype))

    def _mix(
        self,
        qkv: Tensor,
        decay: Tensor,
        beta: Tensor,
        step: StateStep,
        states: tuple[Tensor, ...],
    ) -> Tensor:
        """[T, num_value_heads, value_dim]; the states go on."""
        inputs, matrices = states
        outputs, count = [], step.num_decodes
        if count:
            fresh = step.fresh.view(-1, 1, 1)
            before = inputs[step.reads].masked_fill_(fresh, 0)
            seen = torch.cat((before, qkv[:count, None]), 1)
            state = matrices[step.reads].masked_fill_(fresh[..., None], 0)
            q, k, v = self._heads(self._convolve(seen)[:, 0])
            output, state = recurrent_step(q, k, v, decay[:count], beta[:count], state)
            inputs[step.writes], matrices[step.writes] = seen[step.written, 1:], state[step.written]
            outputs.append(output)
        for piece in step.pieces:
            rows = piece.rows
            before = (
                inputs.new_zeros(inputs.shape[1:]) if piece.read is None else inputs[piece.read]
            )
            seen = torch.cat((before, qkv[rows]))
            state = (
                matrices.new_zeros(matrices.shape[1:])
                if piece.read is None
                else matrices[piece.read]
            )
            q, k, v = self._heads(self._convolve(seen))
            output, state = chunked(q, k, v, decay[rows], beta[rows], state)
            for slot in piece.writes:
                inputs[slot], matrices[slot] = seen[len(seen) - len(before) :], state
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _convolve(self, seen: Tensor) -> Tensor:
        """[..., conv_kernel - 1 + T, channels] -> [..., T, channels]"""
        count = seen.shape[-2] - len(self.taps) + 1
        return F.silu(sum(seen[..., i : i + count, :] * tap for i, tap in enumerate(self.taps)))

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


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
