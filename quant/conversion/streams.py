"""How a model with several streams of hidden states enters its blocks and leaves them (architectures/alt_up.py), in
float32. Activations hold the streams side by side, [n, T, num_streams * hidden]."""

import torch
from torch import Tensor

from ...architectures.base import AltUp, ModelSpec
from ..checkpoint import Checkpoint


def start(embedded: Tensor, spec: AltUp, model: ModelSpec, checkpoint: Checkpoint) -> Tensor:
    """embedded [n, T, hidden] -> activations."""
    others = [
        _as_long(_project(embedded, model.prefix + name, checkpoint), embedded)
        for name in spec.projections
    ]
    return torch.cat([embedded, *others], dim=-1)


def end(streams: Tensor, spec: AltUp, model: ModelSpec, checkpoint: Checkpoint) -> Tensor:
    """Activations -> [n, T, hidden], which the final norm reads."""
    first, *others = streams.split(model.hidden_size, dim=-1)
    back = [
        _as_long(_project(stream, model.prefix + name, checkpoint), first)
        for stream, name in zip(others, spec.unprojections, strict=True)
    ]
    return torch.stack([first, *back]).mean(0)


def _project(x: Tensor, module: str, checkpoint: Checkpoint) -> Tensor:
    return x @ checkpoint.dense(module, torch.float32).to(x.device).t()


def _as_long(x: Tensor, like: Tensor) -> Tensor:
    """x with the root mean square of `like`, in its last axis."""
    wanted, found = (each.square().mean(-1, keepdim=True) for each in (like, x))
    return x * (wanted.sqrt() / found.clamp(min=1e-5).sqrt())
