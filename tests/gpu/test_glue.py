"""The small kernels compiled, on rows as wide as real models', against torch in float64 and the engine's sampler.

The tests of tests/kernels, which `make test-gpu` runs compiled too, go through every option.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BF16, HALF, on_device  # noqa: F401  (a fixture)

from nibble.engine.backends.torch.layers import apply_rope
from nibble.kernels.attention.cache import PagedCache
from nibble.kernels.fused.activation import gated
from nibble.kernels.fused.norm import rms_norm
from nibble.kernels.fused.rope import rope_and_cache
from nibble.kernels.sampling.sample import SamplingRows, greedy, sample

TOLERANCE = {HALF: 2e-3, BF16: 1.6e-2}


def near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 4096), (64, 4096), (2048, 3584), (5, 8192), (3, 576)]
)
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = (
        torch.randn(shape).to(dtype) for shape in ((rows, width), (rows, width), (width,))
    )
    summed = (residual.double() + x.double()).to(dtype)
    want = F.rms_norm(summed.double(), (width,), weight.double(), 1e-5)
    got = rms_norm(x, weight, 1e-5, residual)
    near(residual, summed, dtype)
    near(got, want, dtype)


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (64, 14336), (300, 18944), (3, 1536)])
def test_gated(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * width).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    near(gated(gate_up, "silu"), F.silu(gate) * up, dtype)
    near(gated(gate_up, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up, dtype)


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (28, 4, 128), (9, 3, 64)])
@pytest.mark.parametrize("rows", [1, 300])
def test_rope_and_cache(heads: int, kv_heads: int, dim: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    angles = torch.rand(4096, dim // 2) * 6
    positions, slots = torch.randint(0, 4096, (rows,)), torch.randperm(20 * 16)[:rows]
    pages = PagedCache(*torch.zeros(2, kv_heads, 20, 16, dim, dtype=dtype))
    want = qkv.double()
    apply_rope(
        want[:, : heads + kv_heads],
        *(t.double()[positions].unsqueeze(1) for t in (angles.cos(), angles.sin())),
    )
    rope_and_cache(qkv, heads, angles.cos(), angles.sin(), positions, slots, pages)
    near(qkv[:, :heads], want[:, :heads], dtype)
    near(
        pages.keys.flatten(1, 2)[:, slots].transpose(0, 1), want[:, heads : heads + kv_heads], dtype
    )
    near(pages.values.flatten(1, 2)[:, slots].transpose(0, 1), want[:, heads + kv_heads :], dtype)


def test_greedy_on_a_real_vocabulary() -> None:
    logits = torch.randn(256, 128256)
    assert torch.equal(greedy(logits), logits.argmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9), (1, 1.0)])
def test_draws_stay_within_the_filters(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    rows, vocab = 256, 128256
    logits = (torch.randn(1, vocab) * 3).repeat(rows, 1)
    keys = torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32)
    filters = torch.tensor([[0.8, top_k, top_p, 0.0]]).repeat(rows, 1)
    tokens = sample(logits, SamplingRows(filters, keys))
    assert torch.equal(tokens, sample(logits, SamplingRows(filters, keys))), (
        "the same key draws the same token"
    )
    ordered, ids = (logits[0] / 0.8).sort(descending=True)
    share = ordered.softmax(-1) if not top_k else ordered[:top_k].softmax(-1)
    kept = ids[: len(share)][share.cumsum(0) - share < top_p + 1e-5]
    assert bool(torch.isin(tokens, kept).all())
    assert top_k == 1 or len(set(tokens.tolist())) > 10


def test_draws_have_the_distribution_of_the_logits() -> None:
    torch.manual_seed(0)
    rows, shares = 100_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    keys = torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32)
    filters = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(rows, 1)
    tokens = sample(shares.log().repeat(rows, 1), SamplingRows(filters, keys))
    torch.testing.assert_close(
        torch.bincount(tokens, minlength=4) / rows, shares, atol=0.01, rtol=0
    )
