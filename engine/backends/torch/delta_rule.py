"""The gated delta rule in torch's operators (Yang et al. 2024, "Gated Delta Networks"), in float32:

    S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q

token by token, or in chunks: what the tokens of a chunk do to one another is a triangular system, so that a chunk takes
a few matrix products (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule").
"""

import torch
from torch import Tensor

CHUNK = 64


def recurrent_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token each of B requests: q, k [B, heads, K], v [B, heads, V], g, beta [B, heads], state [B, heads, K, V].
    Returns o [B, heads, V] and the new states."""
    state = state * g.exp()[..., None, None]
    known = (state * k[..., None]).sum(-2)
    delta = (v - known) * beta[..., None]
    state = state + k[..., None] * delta[..., None, :]
    return (state * q[..., None]).sum(-2), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """T tokens of one request: q, k [T, heads, K], v [T, heads, V], g, beta [T, heads], state [heads, K, V]. Returns o
    [T, heads, V] and the new state."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    g, beta = g.t(), beta.t()
    outputs = []
    for first in range(0, q.shape[1], CHUNK):
        part = slice(first, first + CHUNK)
        output, state = _chunk(q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], state)
        outputs.append(output)
    return torch.cat(outputs, 1).transpose(0, 1), state


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Heads first: q, k [heads, C, K], v [heads, C, V], g, beta [heads, C]."""
    total = g.cumsum(1)  # log of what is left, at a token, of the state before the chunk
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    left = (total[:, :, None] - total[:, None]).masked_fill(later, float("-inf")).exp()
    scaled = k * beta[..., None]
    system = (scaled @ k.mT) * left  # row i: what token i corrects of what those before it wrote
    wanted = (v - (k * total.exp()[..., None]) @ state) * beta[..., None]
    delta = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    output = (q * total.exp()[..., None]) @ state + ((q @ k.mT) * left) @ delta
    end = total[:, -1:]
    kept = k * (end - total).exp()[..., None]
    return output, state * end.exp()[..., None] + kept.mT @ delta
