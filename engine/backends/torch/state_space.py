"""Mamba-2's state space in torch's operators (Dao and Gu 2024, "Transformers are SSMs"), in float32:

    S = exp(g) S + b x^T;  y = S^T c

token by token, or in chunks, within which it is attention without a softmax (section 6 there).
"""

import torch
from torch import Tensor

CHUNK = 64


def recurrent_step(
    b: Tensor, c: Tensor, x: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token each of B requests: b, c [B, heads, N], x [B, heads, P], g [B, heads], state [B, heads, N, P]. Returns
    y [B, heads, P] and the new states."""
    state = state * g.exp()[..., None, None] + b[..., None] * x[..., None, :]
    return (state * c[..., None]).sum(-2), state


def chunked(b: Tensor, c: Tensor, x: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """T tokens of one request: b, c [T, heads, N], x [T, heads, P], g [T, heads], state [heads, N, P]. Returns y [T,
    heads, P] and the new state."""
    b, c, x = (each.transpose(0, 1) for each in (b, c, x))
    outputs = []
    for first in range(0, b.shape[1], CHUNK):
        part = slice(first, first + CHUNK)
        output, state = _chunk(b[:, part], c[:, part], x[:, part], g.t()[:, part], state)
        outputs.append(output)
    return torch.cat(outputs, 1).transpose(0, 1), state


def _chunk(b: Tensor, c: Tensor, x: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Heads first: b, c [heads, C, N], x [heads, C, P], g [heads, C]."""
    total = g.cumsum(1)  # log of what is left, at a token, of the state before the chunk
    later = torch.ones(b.shape[1], b.shape[1], dtype=torch.bool, device=b.device).triu(1)
    left = (total[:, :, None] - total[:, None]).masked_fill(later, float("-inf")).exp()
    output = (c * total.exp()[..., None]) @ state + ((c @ b.mT) * left) @ x
    end = total[:, -1:]
    kept = b * (end - total).exp()[..., None]
    return output, state * end.exp()[..., None] + kept.mT @ x
