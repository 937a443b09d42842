"""The decoder of `decoder.py` from Triton's kernels, nine or ten launches a layer (kernels/fused lists them).

x [T, hidden] runs through the layers as `residual`, which every norm adds to and reads in one launch:

    residual = embedding             h = input norm(residual)
    qkv -> (q, k norms), RoPE, K and V to their pages -> paged attention -> o
    residual += (norm of) o          h = mlp norm(residual)
    gate_up -> act(gate) * up -> down
    residual += (norm of) down       h = next layer's input norm(residual), or the final norm

Steps of decodes alone are replayed from CUDA graphs (graphs.py), others are launched as they come.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import DecoderConfig
from ....kernels.attention.paged import (
    AttentionSpec,
    PagedBatch,
    PagedCache,
    allocate_scales,
    paged_attention,
)
from ....kernels.fused.activation import gated
from ....kernels.fused.norm import MAX_WIDTH, rms_norm
from ....kernels.fused.rope import Pages, rope_and_cache
from ...config import EngineConfig
from ...scheduling.batch import ScheduledRequest
from ..torch.decoder import Decoder, DecoderLayer
from .batch import DeviceBatch, SampledTokens, StaticBatch, upload
from .graphs import DecodeGraphs, Record

_CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def why_not(config: DecoderConfig) -> str | None:
    """None if this decoder can serve the model where Triton's kernels run, else the reason."""
    if not 16 <= config.head_dim <= 256 or config.head_dim % 2:
        return f"has no attention for heads of {config.head_dim} dimensions"
    if config.hidden_size > MAX_WIDTH:
        return f"has no norm for a hidden size of {config.hidden_size}"
    return None


@dataclass(slots=True)
class TritonCache:
    """Keys and values of each layer, [num_kv_heads, num_blocks, block_size, head_dim]; in 8 bits with a float32 scale
    for each token and head."""

    layers: list[PagedCache]
    block_size: int

    @classmethod
    def allocate(
        cls,
        model: DecoderConfig,
        num_blocks: int,
        config: EngineConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "TritonCache":
        shape = (2, model.num_kv_heads, num_blocks, config.block_size, model.head_dim)
        stored = _CACHE_DTYPES.get(config.kv_cache_dtype, dtype)

        def layer() -> PagedCache:
            keys, values = torch.zeros(
                shape, dtype=torch.uint8 if stored.itemsize == 1 else stored, device=device
            ).view(stored)
            scales = [
                allocate_scales(num_blocks, config.block_size, model.num_kv_heads, device)
                if stored.itemsize == 1
                else None
                for _ in range(2)
            ]
            return PagedCache(keys, values, *scales)

        return cls([layer() for _ in range(model.num_layers)], config.block_size)

    def clear(self, blocks: list[int]) -> None:
        """Nothing: the attention kernel never reads behind a request's last token."""


@dataclass(frozen=True, slots=True)
class _Captured:
    """Decode steps over one cache, for the limits of one engine."""

    graphs: DecodeGraphs
    static: StaticBatch
    cache: TritonCache


class TritonDecoder:
    """`decoder`'s weights, run by the kernels."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.dtype, self.device = decoder.embedding.dtype, decoder.embedding.device
        self.captured: _Captured | None = None

    def new_cache(self, num_blocks: int, config: EngineConfig) -> TritonCache:
        return TritonCache.allocate(
            self.decoder.config, num_blocks, config, self.dtype, self.device
        )

    def capture(
        self, record: Record, cache: TritonCache, max_num_seqs: int, max_model_len: int
    ) -> None:
        """From now on, steps of decodes over `cache` come from graphs."""
        static = StaticBatch(
            max_num_seqs, -(-max_model_len // cache.block_size), cache.block_size, self.device
        )
        graphs = DecodeGraphs(
            max_num_seqs, record, lambda size: self._hidden_states(static.view(size), cache)
        )
        self.captured = _Captured(graphs, static, cache)

    def forward(
        self,
        items: list[ScheduledRequest],
        cache: TritonCache,
        previous: SampledTokens | None = None,
    ) -> Tensor:
        """Compute the items' tokens (decodes first), writing their keys and values to the cache. Returns the hidden
        states of all [T, hidden] after the final norm; those of a graph are overwritten by its next replay."""
        hidden = self._replayed(items, cache, previous)
        if hidden is not None:
            return hidden
        return self._hidden_states(upload(items, cache.block_size, previous, self.device), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [R, hidden] of what `forward` gave -> float32 [R, vocab]."""
        return self.decoder.lm_head(hidden).float()

    def _replayed(
        self, items: list[ScheduledRequest], cache: TritonCache, previous: SampledTokens | None
    ) -> Tensor | None:
        """The hidden states from a graph; None where there is none for this step."""
        captured = self.captured
        if (
            captured is None
            or cache is not captured.cache
            or any(item.num_tokens > 1 for item in items)
        ):
            return None
        size = captured.graphs.size_for(len(items))
        if size is None:
            return None
        captured.static.load(items, size, previous)
        hidden = captured.graphs.replay(size)
        return None if hidden is None else hidden[: len(items)]

    def _hidden_states(self, batch: DeviceBatch, cache: TritonCache) -> Tensor:
        decoder, config = self.decoder, self.decoder.config
        x = F.embedding(batch.token_ids, decoder.embedding)
        if config.embedding_scale != 1.0:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype)
        residual, paged = x, self._paged(batch, cache)
        hidden, _ = rms_norm(x, decoder.layers[0].input_norm.weight, config.rms_norm_eps)
        following = [layer.input_norm for layer in decoder.layers[1:]] + [decoder.norm]
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, following, strict=True)):
            mixed = self._attention(layer, index, hidden, batch, cache.layers[index], paged)
            hidden, _ = rms_norm(
                mixed,
                layer.mlp_norm.weight,
                config.rms_norm_eps,
                residual,
                post_weight=_weight(layer.post_attention_norm),
            )
            inner, _ = gated(layer.gate_up(hidden), config.activation)
            hidden, _ = rms_norm(
                layer.down(inner),
                next_norm.weight,
                config.rms_norm_eps,
                residual,
                post_weight=_weight(layer.post_mlp_norm),
            )
        return hidden

    def _paged(self, batch: DeviceBatch, cache: TritonCache) -> PagedBatch:
        return PagedBatch(
            batch.tables,
            batch.starts,
            batch.lengths,
            batch.num_decodes,
            max_context=batch.tables.shape[1] * cache.block_size,
        )

    def _attention(
        self,
        layer: DecoderLayer,
        index: int,
        hidden: Tensor,
        batch: DeviceBatch,
        cache: PagedCache,
        paged: PagedBatch,
    ) -> Tensor:
        config = self.decoder.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(hidden).view(-1, heads + 2 * kv_heads, dim)
        table = self.decoder.rope[config.layer_types[index]]
        pages = Pages(cache.keys, cache.values, cache.key_scales, cache.value_scales)
        rope_and_cache(
            qkv,
            heads,
            table.cos,
            table.sin,
            batch.positions,
            batch.slots,
            pages,
            q_weight=_weight(layer.q_norm),
            k_weight=_weight(layer.k_norm),
            eps=config.rms_norm_eps,
        )
        spec = AttentionSpec(config.attention_scale or dim**-0.5, config.window(index))
        return layer.o(paged_attention(qkv[:, :heads], cache, paged, spec).flatten(1))


def _weight(norm) -> Tensor | None:
    return None if norm is None else norm.weight
