"""Latent attention in torch's operators, over a cache of latents (attention.py).

One token of a request meets the latents themselves: W_k is applied to its queries, W_v to what they find, so that all
heads read one vector of each token. Chunks are as many as that costs: there keys and values are made of the latents, of
some heads at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import LatentAttention
from .attention import AttentionMetadata, KVCache, _DecodeView

_HEADS = 8  # whose keys and values are made at a time


def latent_attention(
    q: Tensor,
    latents: Tensor,
    kv_b: Tensor,
    bias: Tensor | None,
    spec: LatentAttention,
    cache: KVCache,
    layer: int,
    meta: AttentionMetadata,
) -> Tensor:
    """Write this step's latents, then attend.

    q [T, num_heads, nope_dim + rope_dim] and latents [T, kv_rank + rope_dim], rotated; kv_b [num_heads, nope_dim +
    value_dim, kv_rank], bias [num_heads, nope_dim + value_dim] or None. Returns [T, num_heads * value_dim].
    """
    cache.write(layer, meta.slots, latents[:, None, None])
    outputs, first = [], meta.num_decodes
    if first:
        outputs.append(_decode(q[:first], kv_b, spec, cache, layer, meta.decode_view(None)))
        if bias is not None:
            outputs[0] = outputs[0] + bias[:, spec.nope_dim :].flatten()
    offset = first
    for index, item in enumerate(meta.items[first:], first):
        rows = slice(offset, offset + item.num_tokens)
        offset += item.num_tokens
        seen, mask = latents[rows], None
        if item.start:
            blocks, mask = meta.view(index, None)
            seen = cache.gather(layer, blocks)[0, 0]
        outputs.append(_attend(q[rows], seen, kv_b, bias, spec, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(
    q: Tensor, kv_b: Tensor, spec: LatentAttention, cache: KVCache, layer: int, view: _DecodeView
) -> Tensor:
    """One query token per request. To torch, requests are the batch and query heads the rows of one head."""
    key_rows, value_rows = kv_b.split((spec.nope_dim, spec.value_dim), dim=1)
    nope, turned = q.split((spec.nope_dim, spec.rope_dim), dim=-1)
    absorbed = torch.einsum("bhn,hnr->bhr", nope, key_rows)
    seen = cache.gather(layer, view.blocks).view(len(q), 1, view.width, -1)
    mixed = F.scaled_dot_product_attention(
        torch.cat((absorbed, turned), -1)[:, None],
        seen,
        seen[..., : spec.kv_rank],
        attn_mask=None if view.mask is None else view.mask.transpose(0, 1),
        scale=spec.scale,
    )
    return torch.einsum("bhr,hvr->bhv", mixed[:, 0], value_rows).flatten(1)


def _attend(
    q: Tensor,
    seen: Tensor,
    kv_b: Tensor,
    bias: Tensor | None,
    spec: LatentAttention,
    mask: Tensor | None,
) -> Tensor:
    """q [tokens, num_heads, nope_dim + rope_dim], seen [context, kv_rank + rope_dim]; no mask: causal from the
    start."""
    latents, turned = seen.split((spec.kv_rank, spec.rope_dim), dim=-1)
    outputs = []
    for first in range(0, spec.num_heads, _HEADS):
        heads = slice(first, first + _HEADS)
        own = None if bias is None else bias[heads].flatten()
        made = F.linear(latents, kv_b[heads].flatten(0, 1), own).view(len(seen), -1, kv_b.shape[1])
        keys, values = made.transpose(0, 1).split((spec.nope_dim, spec.value_dim), dim=-1)
        out = F.scaled_dot_product_attention(
            q[:, heads].transpose(0, 1)[None],
            torch.cat((keys, turned.expand(len(keys), -1, -1)), -1)[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=spec.scale,
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs, 1).flatten(1)
