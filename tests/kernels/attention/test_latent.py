"""Latent attention in Triton's interpreter against attention written out in float64."""

import pytest
import torch
from kernel_cases import BF16, DEVICE, HALF, on_device  # noqa: F401  (a fixture)
from latent_case import LatentCase

from nibble.architectures.base import Rope
from nibble.engine.backends.torch.layers import RMSNorm, RopeTable, apply_rope
from nibble.kernels.attention import latent
from nibble.kernels.attention.latent import latent_attention, latent_rope_and_cache
from nibble.kernels.errors import KernelArgumentError


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test's few keys are split, too."""
    monkeypatch.setattr(latent, "MIN_SPLIT", 32)


@pytest.mark.parametrize(
    ("heads", "rank", "rope", "dtype"),
    [(5, 32, 16, HALF), (20, 48, 8, HALF), (40, 32, 16, HALF), (16, 64, 32, BF16)],
)
def test_decodes_and_chunks(heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    """Contexts at the edges of tiles and blocks, an empty slot of a graph, a chunk after a prefix."""
    lengths = [(1, 1), (33, 1), (0, 1), (64, 1), (7, 7), (41, 3)]
    LatentCase(lengths, 4, heads, rank, rope, dtype, max_context=32).check()


def test_chunks_alone() -> None:
    LatentCase([(18, 18), (3, 2)], 0, 3, 32, 16).check()


def test_splits_of_long_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card with many multiprocessors: three splits of one, one of the other, none of an empty slot."""
    monkeypatch.setattr(latent, "num_splits", lambda *of: 4)
    LatentCase([(90, 1), (20, 1), (0, 1)], 3, 3, 48, 16).check()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("nope", "rope", "rank"), [(32, 16, 32), (24, 10, 48)])
def test_what_is_cached_is_normed_and_turned(
    interleaved: bool, nope: int, rope: int, rank: int
) -> None:
    torch.manual_seed(0)
    q, found = torch.randn(3, 2, nope + rope).half(), torch.randn(3, rank + rope + 1).half()
    latents, weight = found[:, 1:], torch.randn(rank).half()
    table = RopeTable.build(rope, Rope(100.0), 64, torch.float32, DEVICE)
    positions, slots = torch.tensor([0, 5, 40]), torch.tensor([6, -1, 3])
    want_q, want = q.double(), latents.double()
    cos, sin = (each.double() for each in table.at(positions))
    apply_rope(want_q[..., nope:], cos, sin, interleaved)
    apply_rope(want[:, None, rank:], cos, sin, interleaved)
    want[:, :rank] = RMSNorm(weight.double(), 1e-3)(want[:, :rank])
    cache = torch.zeros(2, 4, rank + rope).half()
    latent_rope_and_cache(
        q,
        latents,
        weight,
        1e-3,
        table.cos,
        table.sin,
        positions,
        slots,
        cache,
        interleaved=interleaved,
    )
    torch.testing.assert_close(q.double(), want_q, atol=2e-3, rtol=2e-3)
    rows = cache.flatten(0, 1).double()
    torch.testing.assert_close(rows[[6, 3]], want[[0, 2]], atol=2e-3, rtol=2e-3)
    rows[[6, 3]] = 0
    assert not rows.any()


def test_wrong_arguments_are_named() -> None:
    case = LatentCase([(3, 1)], 1, 2, 32, 16)
    with pytest.raises(KernelArgumentError, match=r"cache has shape \[4, 16, 48\]"):
        latent_attention(case.q, case.turned[..., 1:], case.cache, case.batch, 1.0)
    with pytest.raises(KernelArgumentError, match="at most 512"):
        latent_attention(torch.zeros(1, 2, 520).half(), case.turned, case.cache, case.batch, 1.0)
    with pytest.raises(KernelArgumentError, match="heads of 8 cannot turn 16 dimensions"):
        one = torch.zeros(1, dtype=torch.int64)
        table = torch.ones(4, 8)
        latent_rope_and_cache(
            torch.zeros(1, 2, 8),
            torch.zeros(1, 48),
            torch.ones(32),
            1e-6,
            table,
            table,
            one,
            one,
            case.cache,
            interleaved=False,
        )
