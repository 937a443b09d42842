"""Feed-forwards in torch's operators, one class a kind (architectures/base.py)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import GatedMlp
from .linear import FusedLinear


@dataclass(slots=True)
class TorchGatedMlp:
    """down(act(gate) * up)"""

    spec: GatedMlp
    gate_up: FusedLinear
    down: FusedLinear

    def __call__(self, h: Tensor) -> Tensor:
        """h [T, hidden], normed."""
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(activate(gate, self.spec.activation) * up)


def activate(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
