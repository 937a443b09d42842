"""Compiled latent attention on real sizes and contexts, against float64."""

import pytest
import torch
from kernel_cases import BF16, HALF, on_device  # noqa: F401  (a fixture)
from latent_case import LatentCase

from nibble.kernels.attention.latent import latent_attention
from nibble.kernels.attention.paged import PagedBatch

# Decodes: block boundaries, an empty slot, contexts that are split or not; then chunks with and without prefix.
STEP = [(1, 1), (17, 1), (0, 1), (255, 1), (4096, 1), (130, 130), (700, 33), (300, 256)]
DECODES = 5

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="latent attention needs compute capability 8.0",
)


@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(128, 512, 64), (16, 512, 64), (20, 512, 64), (40, 256, 32)]
)
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_a_step_of_decodes_and_chunks(heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    LatentCase(STEP, DECODES, heads, rank, rope, dtype).check()


def test_a_long_context_of_one_sequence() -> None:
    LatentCase([(32768, 1)], 1, 16, 512, 64).check()


def test_a_graph_serves_other_lengths() -> None:
    """Captured once for the longest context, replayed for shorter ones and with a slot that is empty."""
    case = LatentCase([(3000, 1), (2000, 1), (1000, 1)], 3, 16, 512, 64)
    lengths = case.batch.context_lengths.clone()
    batch = PagedBatch(
        case.batch.block_tables, case.batch.query_starts, lengths, 3, max_context=3008
    )

    def compute() -> torch.Tensor:
        return latent_attention(case.q, case.turned, case.cache, batch, case.scale)

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    for contexts in ([3000, 2000, 1000], [17, 0, 999], [1, 1, 1]):
        lengths.copy_(torch.tensor(contexts))
        graph.replay()
        assert torch.equal(out, compute())
        assert all(bool(out[i].any()) == (context > 0) for i, context in enumerate(contexts))
