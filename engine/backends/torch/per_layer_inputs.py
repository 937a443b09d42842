"""What every layer of Gemma 3n and 4's small models is told of the token once more (architectures/base.py
PerLayerInputs)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import PerLayerInputs
from .feed_forward import activate
from .layers import RMSNorm
from .linear import FusedLinear


@dataclass(slots=True)
class TorchPerLayerInputs:
    """Of all layers: made once a step."""

    spec: PerLayerInputs
    table: Tensor  # [vocab, num_layers * width]
    projection: FusedLinear  # hidden -> num_layers * width
    norm: RMSNorm  # [width]

    def __call__(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """token_ids [T], embedded [T, hidden] -> [T, num_layers, width]"""
        width = self.spec.width
        projected = self.projection(embedded) * embedded.shape[1] ** -0.5
        projected = self.norm(projected.view(len(embedded), -1, width))
        scale = torch.tensor(width**0.5, dtype=self.table.dtype)
        known = torch.where(token_ids < len(self.table), token_ids, 0)
        own = (F.embedding(known, self.table) * scale).to(embedded)
        given: Tensor = (projected + own.view(projected.shape)) * 2.0**-0.5
        return given


@dataclass(slots=True)
class TorchPerLayerInput:
    """Of one layer: norm(projection(act(gate(x)) * input))"""

    spec: PerLayerInputs
    gate: FusedLinear
    projection: FusedLinear
    norm: RMSNorm

    def __call__(self, x: Tensor, given: Tensor) -> Tensor:
        """x [T, hidden], given [T, width] -> [T, hidden], to be added to x"""
        return self.norm(self.projection(activate(self.gate(x), self.spec.activation) * given))
