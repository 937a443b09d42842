"""One data-driven decoder for the Llama family and its cousins.

A DecoderConfig says where architectures differ; `Decoder` is the same few lines for all of them. One layer, on a flat
batch of T tokens from many requests (there is no batch or padding axis outside attention):

    x [T, hidden] -> input norm -> qkv -> (q, k norm) -> RoPE -> paged attention -> o -> (norm) -> + x
                  -> mlp norm -> gate_up -> act(gate) * up -> down -> (norm) -> + x
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import DecoderConfig
from ...config import EngineConfig
from ...scheduling.batch import ScheduledRequest
from .attention import AttentionMetadata, KVCache, paged_attention
from .layers import RMSNorm, RopeTable, apply_rope
from .linear import Linear


@dataclass(slots=True)
class DecoderLayer:
    input_norm: RMSNorm
    mlp_norm: RMSNorm
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    post_attention_norm: RMSNorm | None
    post_mlp_norm: RMSNorm | None


@dataclass(slots=True)
class Decoder:
    config: DecoderConfig
    embedding: Tensor  # [vocab, hidden]
    layers: list[DecoderLayer]
    norm: RMSNorm
    lm_head: Linear
    rope: dict[str, RopeTable]

    def new_cache(self, num_blocks: int, config: EngineConfig) -> KVCache:
        model = self.config
        return KVCache.allocate(
            model.num_layers,
            num_blocks,
            config.block_size,
            model.num_kv_heads,
            model.head_dim,
            self.embedding.dtype,
            self.embedding.device,
        )

    def forward(self, items: list[ScheduledRequest], cache: KVCache) -> Tensor:
        """Compute the items' tokens (decodes first), writing their keys and values to the cache. Returns the hidden
        states of all [T, hidden], before the final norm."""
        device = self.embedding.device
        token_ids = [token for item in items for token in item.token_ids]
        positions = [position for item in items for position in range(item.start, item.end)]
        meta = AttentionMetadata.build(items, cache.block_size, self.embedding.dtype, device)
        return self._hidden_states(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            cache,
            meta,
        )

    def _hidden_states(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, meta: AttentionMetadata
    ) -> Tensor:
        config = self.config
        x = F.embedding(token_ids, self.embedding)
        if config.embedding_scale != 1.0:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype)
        angles = {kind: table.at(positions) for kind, table in self.rope.items()}
        for index, layer in enumerate(self.layers):
            attended = self._attention(layer, index, layer.input_norm(x), angles, cache, meta)
            if layer.post_attention_norm is not None:
                attended = layer.post_attention_norm(attended)
            x = x + attended
            mixed = self._mlp(layer, layer.mlp_norm(x))
            if layer.post_mlp_norm is not None:
                mixed = layer.post_mlp_norm(mixed)
            x = x + mixed
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] of the rows that need it -> float32 [R, vocab]."""
        return self.lm_head(self.norm(hidden)).float()

    def _attention(
        self,
        layer: DecoderLayer,
        index: int,
        h: Tensor,
        angles: dict[str, tuple[Tensor, Tensor]],
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> Tensor:
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(h).view(-1, heads + 2 * kv_heads, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv = torch.cat(
                (
                    layer.q_norm(qkv[:, :heads]),
                    layer.k_norm(qkv[:, heads : heads + kv_heads]),
                    qkv[:, heads + kv_heads :],
                ),
                dim=1,
            )
        apply_rope(qkv[:, : heads + kv_heads], *angles[config.layer_types[index]])
        scale = config.attention_scale or dim**-0.5
        out = paged_attention(qkv, heads, cache, index, meta, scale, config.window(index))
        return layer.o(out)

    def _mlp(self, layer: DecoderLayer, h: Tensor) -> Tensor:
        gate, up = layer.gate_up(h).chunk(2, dim=-1)
        gate = (
            F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        )
        return layer.down(gate * up)
