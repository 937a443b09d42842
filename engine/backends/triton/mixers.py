"""Mixers by Triton's kernels, one function a kind, on the weights of torch's (engine/backends/torch/mixers.py).

What has no kernel (gates, norms over all heads at once) are torch's operators: a CUDA graph holds them as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....architectures.base import Rope
from ....architectures.rope import switch_of
from ....kernels.attention.latent import latent_attention, latent_rope_and_cache
from ....kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention
from ....kernels.fused.norm import rms_norm
from ....kernels.fused.rope import rope_and_cache
from ....kernels.recurrent.batch import StateBatch
from ....kernels.recurrent.convolution import causal_conv
from ....kernels.recurrent.delta_rule import gated_delta_rule
from ....kernels.recurrent.gated_norm import gated_norm
from ....kernels.recurrent.state_space import state_space
from ..torch.layers import RMSNorm, RopeTable, position_factors
from ..torch.mixers import (
    TorchAttention,
    TorchGatedDeltaNet,
    TorchLatentAttention,
    TorchMamba2,
    TorchMixer,
    TorchShortConv,
)
from .batch import DeviceBatch, LongRows
from .cache import TritonCache


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    batch: DeviceBatch
    cache: TritonCache
    paged: tuple[PagedBatch, ...]  # of each KV group
    ropes: dict[tuple[Rope | None, int], RopeTable]
    norm_eps: float  # of heads

    @classmethod
    def of(
        cls,
        batch: DeviceBatch,
        cache: TritonCache,
        ropes: dict[tuple[Rope | None, int], RopeTable],
        norm_eps: float,
    ) -> "Step":
        paged = tuple(
            PagedBatch(
                tables,
                batch.starts,
                batch.lengths,
                batch.num_decodes,
                max_context=tables.shape[1] * cache.block_size,
            )
            for tables in batch.tables
        )
        return cls(batch, cache, paged, ropes, norm_eps)

    def states_of(self, layer: int) -> tuple[tuple[Tensor, ...], StateBatch]:
        """A layer's states, and which of them the step's tokens go through."""
        if self.batch.states is None:
            raise ValueError("a step without the states of a layer that has one")
        return self.cache.states.layers[layer], self.batch.states


def joined_tables(
    ropes: dict[tuple[Rope | None, int], RopeTable],
) -> tuple[dict[tuple[Rope | None, int], RopeTable], LongRows | None]:
    """Tables with the rows of long factors behind the others, if any rope has them, and where."""
    switch = switch_of(rope for rope, _ in ropes)
    if switch is None:
        return ropes, None
    joined = {}
    for kind, table in ropes.items():
        long = table.long or table
        joined[kind] = RopeTable(torch.cat((table.cos, long.cos)), torch.cat((table.sin, long.sin)))
    return joined, LongRows(switch, min(len(table.cos) for table in ropes.values()))


def mix(mixer: TorchMixer, h: Tensor, layer: int, step: Step) -> Tensor:
    """h [T, hidden], normed -> [T, hidden]. layer: whose part of the cache."""
    if isinstance(mixer, TorchAttention):
        return _attention(mixer, h, layer, step)
    if isinstance(mixer, TorchLatentAttention):
        return _latent_attention(mixer, h, layer, step)
    if isinstance(mixer, TorchGatedDeltaNet):
        return _gated_delta_net(mixer, h, *step.states_of(layer))
    if isinstance(mixer, TorchMamba2):
        return _mamba2(mixer, h, *step.states_of(layer))
    return _short_conv(mixer, h, *step.states_of(layer))


def _attention(mixer: TorchAttention, h: Tensor, layer: int, step: Step) -> Tensor:
    """qkv -> (norms) -> RoPE, K and V to their pages -> paged attention -> (gate) -> o"""
    spec, batch, cache = mixer.spec, step.batch, step.cache.layers[layer]
    group = step.cache.groups[layer]
    qkv, gate = _heads(mixer, h)
    table = step.ropes[spec.rotation]
    by_head = spec.qk_norm == "head"
    rope_and_cache(
        qkv,
        spec.num_heads,
        table.cos,
        table.sin,
        batch.rope_rows,
        batch.slots[group],
        cache,
        q_weight=_weight(mixer.q_norm) if by_head else None,
        k_weight=_weight(mixer.k_norm) if by_head else None,
        eps=step.norm_eps,
        v_norm=spec.v_norm,
        interleaved=spec.rope is not None and spec.rope.interleaved,
    )
    q = qkv[:, : spec.num_heads]
    if spec.query_scaling is not None:
        q *= position_factors(batch.positions, spec.query_scaling).to(q)
    how = AttentionSpec(spec.scale, spec.window, spec.soft_cap, mixer.sinks)
    mixed = paged_attention(q, cache, step.paged[group], how)
    if mixer.head_gate is not None:
        gate = mixer.head_gate(h)[..., None]
    if gate is not None:
        mixed = mixed * gate.sigmoid()
    return mixer.o(mixed.flatten(1))


def _heads(mixer: TorchAttention, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """[T, heads, head_dim] of queries, keys and values, as far as the layer has its own; what a linear of h gives of
    the output's gate, [T, num_heads, head_dim], if there is one."""
    spec = mixer.spec
    qkv, queries = mixer.qkv(h), spec.num_heads * spec.head_dim
    gate = None
    if spec.output_gate == "gate_proj":
        qkv, gate = qkv.tensor_split((-queries,), dim=1)
    elif spec.output_gate == "q_proj":  # [query | gate] of each head
        both, others = qkv.tensor_split((2 * queries,), dim=1)
        query, gate = both.unflatten(1, (spec.num_heads, 2, spec.head_dim)).unbind(2)
        qkv = torch.cat((query.flatten(1), others), 1)
    if spec.keys_are_values:  # before their norm
        qkv = torch.cat((qkv, qkv[:, queries:]), 1)
    if spec.qk_norm == "all":
        qkv = _normed_together(mixer, qkv)
    if gate is not None:
        gate = gate.reshape(-1, spec.num_heads, spec.head_dim)
    return qkv.unflatten(1, (-1, spec.head_dim)), gate


def _normed_together(mixer: TorchAttention, qkv: Tensor) -> Tensor:
    """Queries and keys of [T, queries, keys, values], each over all heads at once."""
    spec, norms = mixer.spec, (mixer.q_norm, mixer.k_norm)
    sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
    *parts, rest = qkv.tensor_split((sizes[0], sum(sizes)), dim=1)
    normed = [
        x if norm is None else rms_norm(x, norm.weight, norm.eps)
        for x, norm in zip(parts, norms, strict=True)
    ]
    return torch.cat((*normed, rest), 1)


def _latent_attention(mixer: TorchLatentAttention, h: Tensor, layer: int, step: Step) -> Tensor:
    """q_a -> norm -> q_b -> RoPE; kv_a -> norm, RoPE -> latents in the cache; attention over them -> o"""
    spec, batch, cache = mixer.spec, step.batch, step.cache.latents[layer]
    group = step.cache.groups[layer]
    q, latents = mixer.inputs(h).tensor_split((-spec.kv_rank - spec.rope_dim,), dim=1)
    if mixer.q_b is not None and mixer.q_norm is not None:
        q = mixer.q_b(rms_norm(q, mixer.q_norm.weight, mixer.q_norm.eps))
    q = q.unflatten(1, (spec.num_heads, spec.head_dim))
    if spec.query_scaling is not None:
        q = q * position_factors(batch.positions, spec.query_scaling).to(q)
    table = step.ropes[spec.rotation]
    latent_rope_and_cache(
        q,
        latents,
        mixer.kv_norm.weight,
        mixer.kv_norm.eps,
        table.cos,
        table.sin,
        batch.rope_rows,
        batch.slots[group],
        cache,
        interleaved=spec.rope.interleaved,
    )
    nope, turned = q.split((spec.nope_dim, spec.rope_dim), dim=2)
    keys, values = mixer.kv_b.split((spec.nope_dim, spec.value_dim), dim=1)
    absorbed = torch.einsum("thn,hnr->thr", nope, keys)
    mixed = latent_attention(absorbed, turned, cache, step.paged[group], spec.scale)
    mixed = torch.einsum("thr,hvr->thv", mixed, values)
    if mixer.kv_bias is not None:  # that of keys adds the same to all scores of a query
        mixed = mixed + mixer.kv_bias[:, spec.nope_dim :]
    return mixer.o(mixed.flatten(1))


def _gated_delta_net(
    mixer: TorchGatedDeltaNet, h: Tensor, states: tuple[Tensor, ...], batch: StateBatch
) -> Tensor:
    """qkv -> convolution, silu -> gated delta rule -> norm -> times silu(z) -> out; in float32 between linears"""
    spec, (inputs, matrices) = mixer.spec, states
    qkv, z = mixer.qkv_z(h).tensor_split((spec.channels,), dim=1)
    qkv = causal_conv(qkv, mixer.taps, inputs, batch, torch.float32, silu=True)
    mixed = gated_delta_rule(
        qkv, mixer.b_a(h), mixer.rate, mixer.dt_bias, matrices, batch, spec.num_key_heads
    )
    return mixer.out(
        gated_norm(
            mixed.flatten(1),
            z,
            mixer.norm.weight,
            mixer.norm.eps,
            num_groups=spec.num_value_heads,
            gate_first=False,
        )
    )


def _mamba2(mixer: TorchMamba2, h: Tensor, states: tuple[Tensor, ...], batch: StateBatch) -> Tensor:
    """x, B, C -> convolution, silu -> state space -> times silu(z) -> norm -> out; in float32 between linears"""
    spec, own, (inputs, matrices) = mixer.spec, mixer.weights, states
    sizes = (spec.values, spec.channels, spec.num_heads)
    z, xbc, dt = mixer.inputs(h).split(sizes, dim=1)
    xbc = causal_conv(xbc, own.taps, inputs, batch, torch.float32, bias=own.bias, silu=True)
    mixed = state_space(
        xbc,
        dt,
        own.rate,
        own.dt_bias,
        own.skip,
        matrices,
        batch,
        spec.num_groups,
        spec.time_step_limit,
    )
    return mixer.out(
        gated_norm(
            mixed.flatten(1),
            z,
            own.norm,
            mixer.eps,
            num_groups=spec.num_groups,
            gate_first=True,
        )
    )


def _short_conv(
    mixer: TorchShortConv, h: Tensor, states: tuple[Tensor, ...], batch: StateBatch
) -> Tensor:
    """B, C, x -> C * conv(B * x) -> out; in float32 between linears"""
    before, after, x = mixer.inputs(h).chunk(3, dim=1)
    return mixer.out(
        causal_conv(
            x,
            mixer.taps,
            states[0],
            batch,
            h.dtype,
            bias=mixer.bias,
            factor=before,
            gate=after,
        )
    )


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
