"""Paged attention in torch operators, and the cache it reads.

The cache of one layer is one tensor. A block holds block_size consecutive tokens of one request; one index_select by
blocks gives a context whose keys (and values) of one head lie side by side, as torch's attention wants them:

    cache.layers[l]  [2, num_kv_heads, num_blocks, block_size, head_dim]
                      ^ 0: keys (rotated), 1: values   ^ request.block_tables[its group]
    of latents       [1, 1, num_blocks, block_size, kv_rank + rope_dim]

A step's tokens lie flat, decode tokens (one per request) first, then the chunks:

    tokens  [ d d d d | c c c c c c c | c c c ]     decodes are attended to in one padded call, chunks one by one
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import Attention, LatentAttention
from ...scheduling.batch import ScheduledRequest
from ..batch import Batch
from .layers import soft_cap


@dataclass(slots=True)
class KVCache:
    layers: dict[int, Tensor]  # of those that attend
    groups: dict[int, int]  # KV group of each of them
    block_size: int

    @classmethod
    def allocate(
        cls,
        mixers: dict[int, Attention | LatentAttention],
        groups: dict[int, int],
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """groups: of each mixer; num_blocks: of each group.

        Zeros: what lies behind a request's last token is gathered with its block and masked, but 0 * NaN is NaN.

        On a CPU they are anonymous pages (torch's own zeros are written out), so a block costs memory from its first
        use on, and a start-up nothing. Not huge pages: the first block would touch one for every head of every layer,
        hundreds of megabytes and half a second of zeroing.
        """

        def zeros(mixer: Attention | LatentAttention, count: int) -> Tensor:
            shape: tuple[int, ...] = 1, 1, count, block_size, sum(dim for _, dim in mixer.kept)
            if isinstance(mixer, Attention):
                shape = 2, mixer.num_kv_heads, count, block_size, mixer.head_dim
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            return torch.frombuffer(
                zero_pages(math.prod(shape) * dtype.itemsize), dtype=dtype
            ).view(shape)

        layers: dict[int, Tensor] = {}
        for index, mixer in mixers.items():
            source = mixer.kv_source if isinstance(mixer, Attention) else None
            own = zeros(mixer, num_blocks[groups[index]]) if source is None else layers[source]
            layers[index] = own
        return cls(layers, groups, block_size)

    def clear(self, blocks: Sequence[list[int]]) -> None:
        """Zero blocks that a failed request may have left NaN in; blocks: of each group."""
        for index, layer in self.layers.items():
            layer[:, :, torch.tensor(blocks[self.groups[index]], device=layer.device)] = 0

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """keys_values [T, 2, num_kv_heads, head_dim], or latents [T, 1, 1, dim], to slots [T] (block * block_size +
        offset)."""
        self.layers[layer].flatten(2, 3).index_copy_(2, slots, keys_values.permute(1, 2, 0, 3))

    def gather(self, layer: int, blocks: Tensor | slice) -> Tensor:
        """blocks [n] -> [2, num_kv_heads, n * block_size, head_dim], or [1, 1, n * block_size, dim], in the order
        given; a slice is not copied."""
        if isinstance(blocks, slice):
            return self.layers[layer][:, :, blocks].flatten(2, 3)
        return self.layers[layer].index_select(2, blocks).flatten(2, 3)


def zero_pages(nbytes: int) -> mmap.mmap:
    """Zeroed memory of ordinary pages, each taken from the machine when it is first written."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


@dataclass(slots=True)
class _DecodeView:
    """The blocks every decoding request looks at, padded to one length, and what of it is real."""

    blocks: Tensor | slice  # int64 [B * n]
    width: int  # tokens per request after padding: n * block_size
    mask: Tensor | None  # additive [1, B, 1, width]; None: every position is real


@dataclass(slots=True)
class AttentionMetadata:
    """Where this step's tokens live; made once a step and shared by all layers of a KV group."""

    slots: Tensor  # int64 [T]
    items: list[ScheduledRequest]
    group: int
    num_decodes: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    _decode_views: dict[int | None, _DecodeView] = field(default_factory=dict)
    _views: dict[tuple[int, int | None], tuple[Tensor | slice, Tensor]] = field(
        default_factory=dict
    )

    @classmethod
    def build(
        cls, batch: Batch, group: int, dtype: torch.dtype, device: torch.device
    ) -> "AttentionMetadata":
        slots = torch.tensor(batch.slot_mapping(group), device=device)
        return cls(slots, batch.items, group, batch.num_decodes, batch.block_size, dtype, device)

    @property
    def decodes(self) -> list[ScheduledRequest]:
        return self.items[: self.num_decodes]

    def decode_view(self, window: int | None) -> _DecodeView:
        if window not in self._decode_views:
            self._decode_views[window] = self._make_decode_view(window)
        return self._decode_views[window]

    def view(self, index: int, window: int | None) -> tuple[Tensor | slice, Tensor]:
        """Blocks [n] that item `index` looks at, and its additive mask [tokens, n * block_size]."""
        key = (index, window)
        if key not in self._views:
            self._views[key] = self._make_view(self.items[index], window)
        return self._views[key]

    def _first_block(self, first_query: int, window: int | None) -> int:
        return 0 if window is None else max(0, first_query + 1 - window) // self.block_size

    def _make_decode_view(self, window: int | None) -> _DecodeView:
        size = self.block_size
        firsts = [self._first_block(item.start, window) for item in self.decodes]
        tables = [
            item.request.block_tables[self.group][first : -(-item.end // size)]
            for item, first in zip(self.decodes, firsts, strict=True)
        ]
        longest = max(map(len, tables))
        blocks = self._blocks(
            [block for table in tables for block in table + [table[0]] * (longest - len(table))]
        )
        width = longest * size
        ends = torch.tensor(
            [item.end - first * size for item, first in zip(self.decodes, firsts, strict=True)]
        )
        if window is None and int(ends.min()) == width:
            return _DecodeView(blocks, width, None)
        position = torch.arange(width)
        seen = position < ends[:, None]
        if window is not None:
            seen &= position >= ends[:, None] - window
        return _DecodeView(blocks, width, self._additive(seen)[None, :, None])

    def _make_view(
        self, item: ScheduledRequest, window: int | None
    ) -> tuple[Tensor | slice, Tensor]:
        size = self.block_size
        first = self._first_block(item.start, window)
        table = item.request.block_tables[self.group][first : -(-item.end // size)]
        key = torch.arange(first * size, (first + len(table)) * size)
        query = torch.arange(item.start, item.end)[:, None]
        seen = key <= torch.tensor(item.last_seen)[:, None]
        if window is not None:
            seen &= key > query - window
        return self._blocks(table), self._additive(seen)

    def _blocks(self, blocks: list[int]) -> Tensor | slice:
        """As an index; a slice where they follow one another, as a lone request's mostly do."""
        first, count = blocks[0], len(blocks)
        if blocks == list(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(blocks, device=self.device)

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))
        return mask.to(self.device)


def paged_attention(
    qkv: Tensor,
    spec: Attention,
    cache: KVCache,
    layer: int,
    meta: AttentionMetadata,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write this step's keys and values, if the layer has its own, then attend.

    qkv [T, num_heads + 2 * num_kv_heads, head_dim], or queries alone, rotated; sinks float32 [num_heads], where the
    layer has them. Returns [T, num_heads * head_dim].
    """
    q, kv = qkv[:, : spec.num_heads], None
    if spec.kv_source is None:
        kv = qkv[:, spec.num_heads :].view(-1, 2, spec.num_kv_heads, spec.head_dim)
        cache.write(layer, meta.slots, kv)
    plain = sinks is None and spec.soft_cap is None
    outputs, offset, first = [], 0, 0
    if plain and meta.num_decodes:
        offset = first = meta.num_decodes
        outputs.append(_decode(q[:first], spec, cache, layer, meta.decode_view(spec.window)))
    for index, item in enumerate(meta.items[first:], first):
        rows = slice(offset, offset + item.num_tokens)
        offset += item.num_tokens
        if not plain:
            blocks, mask = meta.view(index, spec.window)
            outputs.append(_attend_plainly(q[rows], cache.gather(layer, blocks), spec, mask, sinks))
        elif kv is not None and _sees_only_itself(item, spec.window):
            # a chunk that starts its sequence needs nothing from the cache
            outputs.append(_attend(q[rows], kv[rows].permute(1, 2, 0, 3), spec.scale, None))
        else:
            blocks, mask = meta.view(index, spec.window)
            outputs.append(_attend(q[rows], cache.gather(layer, blocks), spec.scale, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sees_only_itself(item: ScheduledRequest, window: int | None) -> bool:
    fits = window is None or item.num_tokens <= window
    return item.start == 0 and fits and not item.looks_ahead


def _decode(q: Tensor, spec: Attention, cache: KVCache, layer: int, view: _DecodeView) -> Tensor:
    """One query token per request: the query heads that share a kv head become the rows of one small product.

    torch sees the kv heads as its batch and the requests as its heads, which is how the gathered blocks lie.
    """
    batch, kv_heads = len(q), spec.num_kv_heads
    grouped = q.reshape(batch, kv_heads, spec.num_heads // kv_heads, -1).transpose(0, 1)
    k, v = cache.gather(layer, view.blocks).view(2, kv_heads, batch, view.width, spec.head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=view.mask, scale=spec.scale)
    return out.transpose(0, 1).reshape(batch, -1)


def _attend(q: Tensor, kv: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """q [tokens, num_heads, head_dim], kv [2, num_kv_heads, context, head_dim]; no mask: causal from the start."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        kv[0][None],
        kv[1][None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).flatten(1)


def _attend_plainly(
    q: Tensor, kv: Tensor, spec: Attention, mask: Tensor, sinks: Tensor | None
) -> Tensor:
    """As `_attend`, spelled out in float32 for what torch's own attention lacks: soft caps and sinks."""
    grouped = q.view(len(q), spec.num_kv_heads, -1, spec.head_dim).permute(1, 2, 0, 3).float()
    keys, values = kv.float().unbind()
    scores = soft_cap(grouped @ keys.unsqueeze(1).mT * spec.scale, spec.soft_cap) + mask.float()
    if sinks is not None:
        column = sinks.view(spec.num_kv_heads, -1, 1, 1).expand(-1, -1, len(q), 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1).to(q.dtype)
