"""Sequences of latents in a paged cache, and attention over them written out in float64; in the interpreter, or on a
GPU."""

import torch
from kernel_cases import ATTENTION_TOLERANCE, BLOCK, HALF
from torch import Tensor

from nibble.kernels.attention.latent import latent_attention
from nibble.kernels.attention.paged import PagedBatch


class LatentCase:
    """Sequences of (context, queries), their latents in a paged cache whose every other place is poisoned."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        decodes: int,
        heads: int,
        rank: int,
        rope: int,
        dtype: torch.dtype = HALF,
        **batch: int,
    ):
        torch.manual_seed(heads + rank + len(lengths))
        counts = [-(-context // BLOCK) for context, _ in lengths]
        tables = torch.full((len(lengths), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
        self.cache = torch.full((sum(counts) + 3, BLOCK, rank + rope), float("nan"), dtype=dtype)
        free = torch.randperm(len(self.cache)).tolist()
        self.lengths, self.scale, self.latents = lengths, (rank + rope) ** -0.5, []
        for row, (context, _) in enumerate(lengths):
            blocks = [free.pop() for _ in range(counts[row])]
            tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            seen = torch.randn(context, rank + rope).to(dtype)
            at = torch.arange(context)
            self.cache[tables[row, at // BLOCK].long(), at % BLOCK] = seen
            self.latents.append(seen.double())
        starts = torch.tensor([0] + [queries for _, queries in lengths]).cumsum(0).int()
        contexts = torch.tensor([context for context, _ in lengths]).int()
        self.batch = PagedBatch(tables, starts, contexts, decodes, **batch)
        both = torch.randn(int(starts[-1]), heads, rank + rope + 1).to(dtype)
        self.q, self.turned = both[..., :rank], both[..., rank : rank + rope]

    def expected(self) -> Tensor:
        out, first = [], 0
        for (context, queries), seen in zip(self.lengths, self.latents, strict=True):
            rows = slice(first, first + queries)
            first += queries
            q = torch.cat((self.q[rows], self.turned[rows]), 2).double()
            if not context:
                out.append(torch.zeros_like(self.q[rows]).double())
                continue
            scores = torch.einsum("qhd,kd->hqk", q, seen) * self.scale
            position = torch.arange(context - queries, context)[:, None]
            scores = scores.masked_fill(torch.arange(context) > position, float("-inf"))
            found = torch.einsum("hqk,kd->qhd", scores.softmax(-1), seen)
            out.append(found[..., : self.q.shape[2]])
        return torch.cat(out)

    def check(self) -> None:
        out = latent_attention(self.q, self.turned, self.cache, self.batch, self.scale)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        bound = ATTENTION_TOLERANCE[self.q.dtype]
        torch.testing.assert_close(out.double(), self.expected(), atol=bound, rtol=4 * bound)
