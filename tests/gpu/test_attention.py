"""Compiled paged attention on real heads and contexts, against float64."""

import pytest
import torch
from kernel_cases import BF16, HALF, AttentionCase, on_device  # noqa: F401  (a fixture)

from nibble.kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention

HEADS = [(32, 8, 128), (28, 4, 128), (9, 3, 64), (8, 8, 96), (16, 8, 80), (4, 1, 256), (64, 8, 128)]
# Decodes: block boundaries, an empty slot, contexts that are split or not; then chunks with and without prefix.
STEP = [
    (1, 1),
    (16, 1),
    (17, 1),
    (0, 1),
    (255, 1),
    (1025, 1),
    (4096, 1),
    (130, 130),
    (700, 33),
    (513, 1),
    (300, 256),
]
DECODES = 7


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("kind", ["same", "int8", "fp8", "fp8-tensor"])
def test_a_step_of_decodes_and_chunks(heads: int, kv_heads: int, dim: int, kind: str) -> None:
    AttentionCase(STEP, heads, kv_heads, dim, HALF, kind, decodes=DECODES).check()


@pytest.mark.parametrize("kind", ["same", "int8", "fp8", "fp8-tensor"])
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_every_cache_and_activation(kind: str, dtype: torch.dtype) -> None:
    case = AttentionCase(STEP, 32, 8, 128, dtype, kind, decodes=DECODES)
    case.check(splits=1)
    case.check(splits=16)


@pytest.mark.parametrize("window", [1, 128, 1000])
@pytest.mark.parametrize("kind", ["same", "fp8"])
def test_sliding_windows(window: int, kind: str) -> None:
    AttentionCase(STEP, 32, 8, 128, HALF, kind, decodes=DECODES).check(window=window)


def test_soft_cap_and_sinks() -> None:
    case = AttentionCase(STEP, 32, 8, 128, HALF, decodes=DECODES)
    case.check(soft_cap=30.0)
    case.check(sinks=torch.randn(32) * 3, window=300)


def test_a_long_context_of_one_sequence() -> None:
    """32k keys in as many splits as there are."""
    AttentionCase([(32768, 1)], 32, 8, 128, HALF, decodes=1).check()
    AttentionCase(
        [(20000, 1)],
        8,
        1,
        256,
        BF16 if torch.cuda.get_device_capability() >= (8, 0) else HALF,
        "int8",
        decodes=1,
    ).check()


def test_results_are_the_same_every_time() -> None:
    case = AttentionCase(STEP, 32, 8, 128, HALF, "fp8", decodes=DECODES)
    spec = AttentionSpec(128**-0.5)
    first = paged_attention(case.q, case.cache, case.batch, spec)
    for _ in range(20):
        assert torch.equal(first, paged_attention(case.q, case.cache, case.batch, spec))


def test_a_graph_serves_other_lengths() -> None:
    """Captured once for the longest context, replayed for shorter ones and with a slot that is empty."""
    case = AttentionCase([(3000, 1), (2000, 1), (1000, 1)], 32, 8, 128, HALF, decodes=3)
    lengths = case.batch.context_lengths.clone()
    batch = PagedBatch(
        case.batch.block_tables, case.batch.query_starts, lengths, 3, max_context=3008
    )
    spec = AttentionSpec(128**-0.5, splits=16)
    paged_attention(case.q, case.cache, batch, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(case.q, case.cache, batch, spec)
    for contexts in ([3000, 2000, 1000], [17, 0, 999], [1, 1, 1]):
        lengths.copy_(torch.tensor(contexts))
        graph.replay()
        assert torch.equal(out, paged_attention(case.q, case.cache, batch, spec))
        assert all(bool(out[i].any()) == (context > 0) for i, context in enumerate(contexts))
