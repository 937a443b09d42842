"""The plain decoder, in torch's operators: every kind that a ModelSpec knows, and the oracle of the other backends.

One layer, on a flat batch of T tokens from many requests (there is no batch or padding axis outside attention):

    x [T, hidden] -> (norm) -> qkv -> (q, k norm) -> RoPE -> paged attention -> o -> (norm) -> + x
                  -> (norm) -> gate_up -> act(gate) * up -> down -> (norm) -> + x

What is added to x is multiplied by the model's residual_scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import LayerSpec, ModelSpec, Rope
from ...memory import tensor_bytes
from ..base import HostSampling, KernelReport
from ..batch import Batch
from .attention import AttentionMetadata, KVCache, paged_attention
from .layers import RMSNorm, RopeTable, apply_rope, position_factors, scaled, soft_cap
from .linear import FusedLinear


@dataclass(slots=True)
class TorchLayer:
    """One layer's weights. A norm that the layer does not have is None."""

    spec: LayerSpec
    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    before_mixer: RMSNorm | None
    after_mixer: RMSNorm | None
    before_mlp: RMSNorm | None
    after_mlp: RMSNorm | None
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Tensor | None  # float32 [num_heads]


@dataclass(slots=True)
class TorchDecoder(HostSampling):
    """Consecutive layers; embedding, norm and head where they are the model's first or last."""

    model: ModelSpec
    layers: list[TorchLayer]
    ropes: dict[Rope | None, RopeTable]
    block_size: int
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | None  # [vocab, hidden]
    norm: RMSNorm | None
    head: FusedLinear | None
    report: KernelReport

    @property
    def weight_bytes(self) -> int:
        return tensor_bytes([self.layers, self.embedding, self.head])

    def new_cache(self, num_blocks: int) -> KVCache:
        mixers = [layer.spec.mixer for layer in self.layers]
        return KVCache.allocate(mixers, num_blocks, self.block_size, self.dtype, self.device)

    def forward(self, batch: Batch, cache: KVCache, hidden: Tensor | None = None) -> Tensor:
        x = self._embed(batch) if hidden is None else hidden.to(self.device, self.dtype)
        meta = AttentionMetadata.build(batch, self.dtype, self.device)
        positions = torch.tensor(batch.positions, device=self.device)
        angles = {rope: table.at(positions) for rope, table in self.ropes.items()}
        for index, layer in enumerate(self.layers):
            h = _normed(layer.before_mixer, x)
            mixed = self._attention(layer, index, h, positions, angles, cache, meta)
            x = x + scaled(_normed(layer.after_mixer, mixed), self.model.residual_scale)
            mixed = self._mlp(layer, _normed(layer.before_mlp, x))
            x = x + scaled(_normed(layer.after_mlp, mixed), self.model.residual_scale)
        return _normed(self.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            raise ValueError("these are not the model's last layers")
        logits = scaled(self.head(hidden).float(), self.model.logits_scale)
        return soft_cap(logits, self.model.final_soft_cap)

    def _embed(self, batch: Batch) -> Tensor:
        if self.embedding is None:
            raise ValueError("these are not the model's first layers")
        x = F.embedding(torch.tensor(batch.token_ids, device=self.device), self.embedding)
        if self.model.embedding_scale == 1.0:
            return x
        return x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)

    def _attention(
        self,
        layer: TorchLayer,
        index: int,
        h: Tensor,
        positions: Tensor,
        angles: dict[Rope | None, tuple[Tensor, Tensor]],
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> Tensor:
        spec = layer.spec.mixer
        rotated = spec.num_heads + spec.num_kv_heads
        qkv = layer.qkv(h).view(-1, rotated + spec.num_kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys, values = qkv.split(
                (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1
            )
            if spec.qk_norm == "all":
                queries, keys = queries.flatten(1), keys.flatten(1)
            normed = layer.q_norm(queries), layer.k_norm(keys)
            qkv = torch.cat([*(x.view(len(x), -1, spec.head_dim) for x in normed), values], dim=1)
        apply_rope(qkv[:, :rotated], *angles[spec.rope])
        if spec.query_scaling is not None:
            qkv[:, : spec.num_heads] *= position_factors(positions, spec.query_scaling).to(qkv)
        return layer.o(paged_attention(qkv, spec, cache, index, meta, layer.sinks))

    def _mlp(self, layer: TorchLayer, h: Tensor) -> Tensor:
        gate, up = layer.gate_up(h).chunk(2, dim=-1)
        silu = layer.spec.mlp.activation == "silu"
        return layer.down((F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up)


def _normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
