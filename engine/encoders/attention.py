"""Attention in which every token of a text sees every other one, or those of a window on both sides of it."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import EncoderBatch

_MAX_DISTANCE = 128  # beyond it all distances are one bucket


@dataclass(slots=True)
class Masks:
    """What is added to scores, or which of them count, by the length of texts: made once a batch for all layers."""

    device: torch.device
    dtype: torch.dtype
    biases: Tensor | None = None  # [buckets, heads]
    _made: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def of(self, length: int, window: int | None) -> Tensor | None:
        """For scores [count, heads, length, length]."""
        key = length, window
        if key not in self._made:
            self._made[key] = self._make(length, window)
        return self._made[key]

    def _make(self, length: int, window: int | None) -> Tensor | None:
        positions = torch.arange(length, device=self.device)
        distances = positions[None, :] - positions[:, None]  # from the one that looks
        if self.biases is not None:
            found = self.biases[buckets(distances, len(self.biases))]
            return found.permute(2, 0, 1)[None].to(self.dtype).contiguous()
        if window is not None and length > window + 1:
            return distances.abs() <= window
        return None


def buckets(distances: Tensor, count: int) -> Tensor:
    """MPNet's (as T5's): half of the buckets for either direction; of these, half for one distance each, the others
    for distances that grow by a factor."""
    half = count // 2
    exact = half // 2
    far = distances.abs()
    grown = torch.log(far.float() / exact) / math.log(_MAX_DISTANCE / exact) * (half - exact)
    large = (exact + grown.clamp_min(0).long()).clamp_max(half - 1)
    return torch.where(far < exact, far, large) + torch.where(distances > 0, half, 0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, batch: EncoderBatch, masks: Masks, window: int | None
) -> Tensor:
    """q, k, v [T, heads, head_dim] -> [T, heads * head_dim]"""
    out = q.new_empty(q.shape)
    parts = (batch.grouped(each) for each in (q, k, v, out))
    for queries, keys, values, into in zip(*parts, strict=True):
        found = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=masks.of(queries.shape[1], window),
        )
        into.copy_(found.transpose(1, 2))
    return out.flatten(1)
