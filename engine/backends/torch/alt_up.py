"""Several streams of hidden states, and the short way around a mixer (architectures/alt_up.py). Coefficients are
float32, streams [num_streams, T, hidden] in the activations' dtype."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....architectures.base import AltUp
from ..weights import AltUpWeights
from .layers import RMSNorm
from .linear import FusedLinear

_LEAST_SQUARE = 1e-5  # mean of squares below which a stream is not made longer


@dataclass(slots=True)
class TorchAltUp:
    """Of the model: into streams, and out of them."""

    spec: AltUp
    projections: FusedLinear  # hidden -> (num_streams - 1) * hidden
    unprojections: list[FusedLinear]

    def start(self, embedded: Tensor) -> Tensor:
        """embedded [T, hidden] -> streams"""
        others = self.projections(embedded).view(len(embedded), -1, embedded.shape[1]).unbind(1)
        return torch.stack([embedded, *(_as_long(other, embedded) for other in others)])

    def end(self, streams: Tensor) -> Tensor:
        """streams -> [T, hidden]"""
        first, *others = streams
        back = (layer(x) for layer, x in zip(self.unprojections, others, strict=True))
        return torch.stack([first, *(_as_long(x, first) for x in back)]).mean(0)


@dataclass(slots=True)
class TorchAltUpLayer:
    """Of one layer: streams before it, and after it."""

    spec: AltUp
    weights: AltUpWeights
    eps: float

    def predict(self, streams: Tensor) -> Tensor:
        """Streams -> what they are expected to be after the layer, the active one being what it computes with."""
        said = F.linear(self._router(streams[self.spec.active]), self.weights.predictions)
        mixing = said.view(len(said), self.spec.num_streams, -1)  # [T, to, from]
        moved = torch.einsum("tji,ith->jth", mixing, streams.float())
        return (streams + moved).to(streams.dtype)

    def correct(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """predicted: streams; computed [T, hidden]: what became of the active one -> streams"""
        shares = 1 + F.linear(self._router(computed), self.weights.corrections)
        news = computed.float() - predicted[self.spec.active]
        return (predicted + shares.t().unsqueeze(-1) * news).to(predicted.dtype)

    def told(self, streams: Tensor) -> Tensor:
        """What the layer's per-layer input reads, [T, hidden]."""
        x, scale = streams[self.spec.active], self.weights.scale
        return x if scale is None else (x * scale).to(x.dtype)

    def _router(self, x: Tensor) -> Tensor:
        """[T, hidden] -> float32 [T, num_streams]"""
        normed = F.rms_norm(x.float(), x.shape[1:], eps=self.eps)
        return F.linear(normed, self.weights.router).tanh()


@dataclass(slots=True)
class TorchLaurel:
    """h + norm(right(left(h)))"""

    left: FusedLinear
    right: FusedLinear
    norm: RMSNorm

    def __call__(self, h: Tensor) -> Tensor:
        return h + self.norm(self.right(self.left(h)))


def _as_long(x: Tensor, like: Tensor) -> Tensor:
    """Rows of x as long as those of `like`."""
    wanted = like.float().square().mean(-1, keepdim=True).sqrt()
    found = x.float().square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE).sqrt()
    return (x * (wanted / found)).to(like.dtype)
