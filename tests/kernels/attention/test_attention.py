"""Paged attention in Triton's interpreter against attention written out in float64."""

import pytest
import torch
from kernel_cases import BF16, BLOCK, FP8, HALF, interpreter_only, on_device  # noqa: F401  (a fixture)
from kernel_cases import AttentionCase as Case

from nibble.kernels.attention import paged
from nibble.kernels.attention.cache import PagedCache, allocate_scales
from nibble.kernels.attention.config import decode_config, num_splits, prefill_config
from nibble.kernels.attention.paged import AttentionSpec, PagedBatch, paged_attention
from nibble.kernels.errors import KernelArgumentError


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test's few keys are split, too."""
    monkeypatch.setattr(paged, "MIN_SPLIT", 32)


BOUNDARIES = [(1, 1), (15, 1), (16, 1), (17, 1), (0, 1), (32, 1), (33, 1), (95, 1)]
CHUNKS = [(1, 1), (16, 16), (17, 17), (40, 7), (33, 1), (50, 34), (70, 70)]


@pytest.mark.parametrize("splits", [1, 4, None])
def test_decode_at_block_boundaries_and_in_empty_slots(splits: int | None) -> None:
    Case(BOUNDARIES, 4, 2, 64, decodes=8).check(splits=splits)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (8, 2), (8, 1), (17, 1)])
def test_query_heads_share_a_tile(heads: int, kv_heads: int) -> None:
    Case([(37, 1), (5, 1)], heads, kv_heads, 64, decodes=2).check(splits=2)
    Case([(37, 21), (5, 5)], heads, kv_heads, 64).check()


@pytest.mark.parametrize("dim", [80, 96, 128, 192, 256])
def test_head_sizes(dim: int) -> None:
    Case([(50, 1), (18, 1), (41, 19)], 4, 2, dim, decodes=2).check(splits=2)


def test_chunks_with_and_without_prefix() -> None:
    Case(CHUNKS, 4, 2, 64).check()


def test_a_step_of_decodes_and_chunks() -> None:
    Case([(60, 1), (0, 1), (16, 1), (16, 16), (45, 20)], 6, 2, 64, decodes=3).check(splits=2)


@pytest.mark.parametrize("window", [1, 15, 16, 33])
def test_sliding_window(window: int) -> None:
    Case([(1, 1), (90, 1), (64, 1), (20, 20), (70, 40)], 4, 2, 64, decodes=3).check(
        window=window, splits=2
    )


@pytest.mark.parametrize("splits", [1, 4])
def test_soft_cap_and_sinks(splits: int) -> None:
    case = Case([(90, 1), (0, 1), (12, 1), (40, 23)], 4, 2, 64, decodes=3)
    case.check(soft_cap=1.5, splits=splits)
    case.check(sinks=torch.tensor([0.5, -2.0, 3.0, 30.0]), window=20, splits=splits)


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("kind", ["same", "int8", "fp8", "fp8-tensor"])
def test_cache_types(kind: str, dtype: torch.dtype) -> None:
    case = Case([(90, 1), (0, 1), (16, 1), (20, 20), (45, 17)], 4, 2, 64, dtype, kind, decodes=3)
    case.check(splits=1)
    case.check(splits=4, window=30)


@interpreter_only
def test_fp8_of_a_card_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_card", lambda device: (90, 4))
    Case([(70, 1), (45, 17)], 4, 2, 96, HALF, "fp8", decodes=1).check()


def test_every_code_of_e4m3_is_exact() -> None:
    """Value rows of one token each: attention of a context of one returns the value itself."""
    bits = torch.arange(256).to(torch.uint8).masked_fill(torch.arange(256) % 128 == 127, 0)
    values = bits.view(FP8).view(1, 1, 1, 256)
    one = torch.ones(1)
    batch = PagedBatch(*(torch.tensor(x).int() for x in ([[0]], [0, 1], [1])), num_decodes=1)
    out = paged_attention(
        torch.zeros(1, 1, 256, dtype=HALF),
        PagedCache(values, values.clone(), one, one),
        batch,
        AttentionSpec(1.0),
    )
    assert torch.equal(out.flatten(), values.flatten().to(HALF))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_weights_of_quantized_values_do_not_underflow(scale: float) -> None:
    """The probabilities carry the value scales; float16 would lose small ones, and overflow on large ones."""
    case = Case([(90, 1), (40, 20)], 2, 1, 64, BF16, "int8", decodes=1)
    case.cache.value_scales.mul_(scale)
    case.v = [x * scale for x in case.v]
    spec = AttentionSpec(64**-0.5, splits=2)
    out = paged_attention(case.q, case.cache, case.batch, spec)
    torch.testing.assert_close(
        out.double() / scale, case.expected(spec) / scale, atol=2e-2, rtol=8e-2
    )


def test_offsets_beyond_32_bits() -> None:
    block = 2**31 // (BLOCK * 64) + 5
    shape = (1, block + 1, BLOCK, 64)
    keys, values = (
        torch.empty(shape, dtype=torch.int8) for _ in "kv"
    )  # only what is written takes memory
    scales = [allocate_scales(block + 1, BLOCK, 1, keys.device) for _ in "kv"]
    keys[:, block], values[:, block] = 1, 7
    for scale in scales:
        scale[block] = 0.5
    batch = PagedBatch(*(torch.tensor(x).int() for x in ([[block]], [0, 1], [9])), num_decodes=1)
    cache = PagedCache(keys, values, *scales)
    assert (
        paged_attention(torch.ones(1, 1, 64, dtype=HALF), cache, batch, AttentionSpec(1.0)) == 3.5
    ).all()


def test_padding_of_a_graph_changes_nothing() -> None:
    """Results depend on neither the sequences beside nor the width of the table, where splits are fixed."""
    alone = Case([(75, 1)], 4, 2, 64, decodes=1)
    spec = AttentionSpec(0.125, splits=4)
    expected = paged_attention(alone.q, alone.cache, alone.batch, spec)
    tables = torch.cat([alone.tables, alone.tables.new_zeros(1, 20)], 1).repeat(3, 1)
    batch = PagedBatch(
        tables, torch.arange(4).int(), torch.tensor([75, 0, 0]).int(), 3, max_context=400
    )
    out = paged_attention(alone.q.repeat(3, 1, 1), alone.cache, batch, spec)
    assert torch.equal(out[:1], expected) and not out[1:].any()


def test_splits_and_tiles_are_bounded() -> None:
    assert num_splits(1, 8, 32768, 256, 132) == 32
    assert num_splits(256, 8, 32768, 256, 132) == 1
    assert num_splits(1, 1, 100, 256, 132) == 1
    for cc in (75, 80, 86, 89, 90, 100, 120):
        for dim in (64, 80, 128, 256):
            for rows in (1, 3, 8, 71):
                for config in (decode_config(cc, dim, rows, 1), prefill_config(cc, dim, rows, 2)):
                    assert config.block_m >= rows and 256 % config.tile == 0


def test_what_does_not_fit_is_one_clear_error() -> None:
    case = Case([(20, 1)], 4, 2, 64, decodes=1)
    keys, values = case.cache.keys, case.cache.values
    spec = AttentionSpec(1.0)
    with pytest.raises(KernelArgumentError, match="needs key_scales and value_scales"):
        PagedCache(keys.to(torch.int8), values.to(torch.int8))
    with pytest.raises(
        KernelArgumentError, match=r"want float32 on (cpu|cuda:0), of shape \(5, 16, 2\)"
    ):
        PagedCache(keys.to(torch.int8), values.to(torch.int8), torch.ones(1), torch.ones(1))
    with pytest.raises(KernelArgumentError, match="one shape and one layout"):
        PagedCache(keys, values.contiguous()[:, :1])
    with pytest.raises(KernelArgumentError, match="must be int32"):
        PagedBatch(case.tables.long(), case.batch.query_starts, case.batch.context_lengths, 1)
    with pytest.raises(KernelArgumentError, match="do not fit keys"):
        paged_attention(case.q[:, :3], case.cache, case.batch, spec)
    with pytest.raises(KernelArgumentError, match="they must agree"):
        paged_attention(case.q.to(BF16), case.cache, case.batch, spec)
    with pytest.raises(KernelArgumentError, match="sinks must be"):
        paged_attention(case.q, case.cache, case.batch, AttentionSpec(1.0, sinks=torch.ones(3)))
    with pytest.raises(KernelArgumentError, match="power of two"):
        AttentionSpec(1.0, splits=3)
