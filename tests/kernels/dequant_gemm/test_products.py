"""Products of every room's codes under Triton's interpreter, against float64 arithmetic on the dequantized weight."""

from pathlib import Path

import pytest
import torch
from kernel_cases import (
    ROUNDING,
    activations,
    make_weight,
    on_device,  # noqa: F401  (a fixture)
    repack,
)
from kernel_cases import check_product as check

from nibble.kernels.dequant_gemm import launch
from nibble.kernels.dequant_gemm.linear import Prepared, multiply
from nibble.kernels.dequant_gemm.tiles import Table, Tile, split_k, table
from nibble.kernels.errors import KernelArgumentError

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


def test_four_bit_words_are_the_layout_drawn() -> None:
    """Bit by bit from the docstring, independently of `shuffle`."""
    weight = make_weight(4, "mid", 3, 200, 32)
    words = repack(weight).words
    assert words.shape == (2, 128, 16)
    for tile, row, position, nibble in ((0, 0, 0, 0), (0, 2, 7, 5), (1, 1, 13, 1), (1, 2, 4, 6)):
        t, j = divmod(position, 4)
        plane, half = nibble % 4, nibble // 4
        feature = tile * 128 + plane * 32 + 2 * (4 * j + t) + half
        code = int(weight.codes[row, feature]) if feature < 200 else 0
        assert (int(words[tile, row, position]) >> (16 * half + 4 * plane)) & 15 == code


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "zero", "out", "inner", "group"),
    [
        (4, "zeros", 70, 256, 128),
        (4, "mid", 64, 160, 64),
        (4, "mins", 33, 128, 32),
        (4, "zeros", 65, 96, 16),
        (2, "zeros", 64, 256, 64),
        (3, "zeros", 40, 320, 128),
        (3, "mid", 64, 160, 32),
        (8, "mid", 64, 96, 32),
        (8, "zeros", 64, 129, 129),
        (4, "zeros", 64, 130, 48),
    ],
)
def test_each_path_is_the_reference(
    bits: int, zero: str, out: int, inner: int, group: int, dtype: torch.dtype
) -> None:
    weight = make_weight(bits, zero, out, inner, group)
    packed = repack(weight)
    for rows in (1, 3):
        x = activations(rows, inner, dtype)
        check(launch.gemv(x, packed, None, TABLE, 1), x, weight)
    x = activations(17, inner, dtype)
    check(launch.gemm(x, packed, None, Tile(64, 16, 64, 4, 2), 1), x, weight)
    dense = launch.dequantize(packed, dtype)
    assert torch.allclose(
        dense.double(), weight.dequantize(torch.float32).double(), rtol=ROUNDING[dtype], atol=1e-6
    )


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("zero", ["zeros", "mins"])
def test_split_along_k_adds_up_and_leaves_its_locks_free(swap: bool, zero: str) -> None:
    weight = make_weight(4, zero, 100, 8 * 128, 128)
    packed, bias = repack(weight), torch.randn(100).half()
    x = activations(5, 8 * 128, torch.float16)
    first = launch.gemm(x, packed, bias, Tile(16, 16, 64, 4, 2, swap), num_sms=8)
    check(first, x, weight, bias)
    check(launch.gemv(x[:2], packed, bias, TABLE, num_sms=8), x[:2], weight, bias)
    assert not packed.locks.any()
    assert torch.equal(first, launch.gemm(x, packed, bias, Tile(16, 16, 64, 4, 2, swap), num_sms=8))


@pytest.mark.parametrize("rows", [0, 1, 5, 41])
def test_rows_choose_the_path(rows: int) -> None:
    weight = make_weight(4, "zeros", 66, 128, 64)
    x = activations(rows, 128, torch.float16)
    y = multiply(x, Prepared(repack(weight), TABLE, 1), None)
    want = x.double() @ weight.dequantize(torch.float32).double().T
    assert y.shape == want.shape and torch.allclose(y.double(), want, rtol=2**-9, atol=0.01)


def test_activations_are_checked() -> None:
    packed = repack(make_weight(4, "mid", 64, 128, 64))
    with pytest.raises(KernelArgumentError, match="rows of 128 features"):
        launch.gemv(torch.zeros(1, 64).half(), packed, None, TABLE, 1)
    with pytest.raises(KernelArgumentError, match="float16 or bfloat16"):
        launch.gemv(torch.zeros(1, 128), packed, None, TABLE, 1)


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
def test_every_card_has_a_table(cc: int) -> None:
    chosen = table("a card without its own table", cc, "int4", Path("no tables here"))
    assert chosen.min_cc <= cc
    assert (
        chosen.dequantize_rows == chosen.gemv_rows + 1
        or chosen.tile(chosen.dequantize_rows - 1).rows >= 128
    )


def test_split_fills_the_card_and_no_more() -> None:
    assert split_k(64, 32, 132) == 4
    assert split_k(1000, 32, 132) == 1
    assert split_k(1, 2, 132) == 1
