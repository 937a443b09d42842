"""GGUF blocks against gguf-py, on random bytes."""

import gguf
import numpy as np
import pytest
import torch

from nibble.quant.formats.gguf.blocks import BITS, BLOCK, DENSE, read_blocks, read_dense

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
          "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108], "MXFP4": []}  # fmt: skip


def random_rows(kind, rows, blocks, seed=0):
    """Random bytes with finite fp16 scales."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, BLOCK[kind][1]), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, 0] = rng.integers(100, 150, rows * blocks)
    for at in HALVES[kind]:
        data[:, at : at + 2] = rng.normal(size=(rows * blocks, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(BITS))
def test_quantized_blocks(kind):
    rows = random_rows(kind, 5, 3)
    weight = read_blocks(rows, kind)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert weight.codes.shape == expected.shape and weight.bits == BITS[kind]
    assert int(weight.codes.max()) < 2**weight.bits
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", sorted(BITS))
def test_the_canonical_form_says_what_the_block_says(kind):
    weight = read_blocks(random_rows(kind, 2, 2), kind)
    assert weight.zeros is None and weight.perm is None
    assert (weight.mins is None) == (kind in ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "MXFP4"))
    assert weight.block == (1, 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)
    exact = kind.endswith("K") or kind == "MXFP4"
    assert weight.scales.dtype == (torch.float32 if exact else torch.float16)


def test_an_exponent_of_255_is_no_number():
    assert read_blocks(np.full((1, 17), 255, np.uint8), "MXFP4").scales.isnan().all()


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_dense_rows(kind):
    values = torch.randn(3, 8).to(DENSE[kind])
    assert torch.equal(read_dense(values.view(torch.uint8).numpy(), kind), values)


def test_block_sizes_are_ggufs():
    for kind, size in BLOCK.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == size
