"""Embeddings of images among those of tokens: what every backend's first layers begin with."""

import torch
from torch import Tensor

from .batch import Batch


def with_images(x: Tensor, batch: Batch) -> Tensor:
    """x [T, hidden_size], the step's tokens embedded and scaled, with the embeddings of images in their places."""
    rows, parts = batch.given
    if not rows:
        return x
    return x.index_copy(0, torch.tensor(rows, device=x.device), torch.cat(parts).to(x))
