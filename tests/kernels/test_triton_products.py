"""Integer products under Triton's interpreter, against float64 arithmetic on the dequantized weight."""

import dataclasses

import pytest
import torch
from kernel_cases import (
    DEVICE,
    ROUNDING,
    activations,
    make_fp8_weight,
    make_weight,
    on_device,  # noqa: F401  (a fixture)
)
from kernel_cases import check_product as check

from nibble.kernels.gptq import launch, linear
from nibble.kernels.gptq.layout import ShuffledWeight, shuffle
from nibble.kernels.gptq.linear import Prepared, multiply
from nibble.kernels.gptq.tuning import Table, Tile, split_k, table
from nibble.kernels.spec import LinearSpec

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
    words = shuffle(weight).words
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
    shuffled = shuffle(weight)
    for rows in (1, 3):
        x = activations(rows, inner, dtype)
        check(launch.gemv(x, shuffled, None, TABLE, 1), x, weight)
    x = activations(17, inner, dtype)
    check(launch.gemm(x, shuffled, None, Tile(64, 16, 64, 4, 2), 1), x, weight)
    dense = launch.dequantize(shuffled, dtype)
    assert torch.allclose(
        dense.double(), weight.dequantize(torch.float32).double(), rtol=ROUNDING[dtype], atol=1e-6
    )


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("zero", ["zeros", "mins"])
def test_split_along_k_adds_up_and_leaves_its_locks_free(swap: bool, zero: str) -> None:
    weight = make_weight(4, zero, 100, 8 * 128, 128)
    shuffled, bias = shuffle(weight), torch.randn(100).half()
    x = activations(5, 8 * 128, torch.float16)
    first = launch.gemm(x, shuffled, bias, Tile(16, 16, 64, 4, 2, swap), processors=8)
    check(first, x, weight, bias)
    check(launch.gemv(x[:2], shuffled, bias, TABLE, processors=8), x[:2], weight, bias)
    assert not shuffled.locks.any()
    assert torch.equal(
        first, launch.gemm(x, shuffled, bias, Tile(16, 16, 64, 4, 2, swap), processors=8)
    )


def test_scales_that_sixteen_bits_do_not_hold_are_kept() -> None:
    weight = make_weight(4, "zeros", 64, 128, 32, torch.float32)
    shuffled, x = shuffle(weight), activations(2, 128, torch.float16)
    assert shuffled.packed_scale is None
    check(launch.gemv(x, shuffled, None, TABLE, 1), x, weight)


def test_scales_below_float16_keep_their_bfloat16() -> None:
    weight, x = (
        make_weight(4, "mid", 64, 128, 32, torch.bfloat16),
        activations(2, 128, torch.float16),
    )
    weight.scales = weight.scales * 2.0**-14
    shuffled = shuffle(weight)
    assert shuffled.packed_scale is torch.bfloat16
    check(launch.gemv(x, shuffled, None, TABLE, 1), x, weight)


@pytest.mark.parametrize("rows", [0, 1, 5, 41])
def test_rows_choose_the_path(rows: int) -> None:
    weight = make_weight(4, "zeros", 66, 128, 64)
    x = activations(rows, 128, torch.float16)
    y = multiply(x, Prepared(shuffle(weight), TABLE, 1), None)
    want = x.double() @ weight.dequantize(torch.float32).double().T
    assert y.shape == want.shape and torch.allclose(y.double(), want, rtol=2**-9, atol=0.01)


def test_activations_are_checked() -> None:
    shuffled: ShuffledWeight = shuffle(make_weight(4, "mid", 64, 128, 64))
    with pytest.raises(ValueError, match="rows of 128 features"):
        launch.gemv(torch.zeros(1, 64).half(), shuffled, None, TABLE, 1)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        launch.gemv(torch.zeros(1, 128), shuffled, None, TABLE, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "inner", "block"), [(70, 192, (70, 192)), (64, 130, (1, 130)), (130, 256, (64, 128))]
)
def test_fp8_weights(out: int, inner: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_fp8_weight(out, inner, block)
    shuffled = shuffle(weight)
    x = activations(5, inner, dtype)
    check(launch.gemm(x, shuffled, None, Tile(64, 16, 64, 4, 2, swap=True), 1), x, weight)
    check(launch.gemv(x[:1], shuffled, None, TABLE, 1), x[:1], weight)
    dense = launch.dequantize(shuffled, dtype)
    assert torch.allclose(
        dense.double(), weight.dequantize(torch.float32).double(), rtol=ROUNDING[dtype], atol=1e-6
    )


def cuda_spec(**changes) -> LinearSpec:
    spec = LinearSpec.of(make_weight(4, "zeros", 64, 128, 64), torch.float16, torch.device("cuda"))
    return dataclasses.replace(spec, **changes)


def test_refusals_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "cuda_capability", lambda device: 80)
    kernel = linear.TritonIntKernel()
    assert kernel.can_implement(cuda_spec()) is None
    assert "CUDA device, not on cpu" in kernel.can_implement(cuda_spec(device=torch.device("cpu")))
    assert "16-bit activations" in kernel.can_implement(cuda_spec(act_dtype=torch.float32))
    assert "2-, 3-, 4- or 8-bit" in kernel.can_implement(cuda_spec(bits=6))
    assert "multiples of 16 columns, not 24" in kernel.can_implement(cuda_spec(block=(1, 24)))
    monkeypatch.setattr(linear, "cuda_capability", lambda device: 75)
    assert kernel.can_implement(cuda_spec()) is None
    assert "bfloat16 needs compute capability 8.0" in kernel.can_implement(
        cuda_spec(act_dtype=torch.bfloat16)
    )
    monkeypatch.setattr(linear, "cuda_capability", lambda device: None)
    assert "sees no NVIDIA card" in kernel.can_implement(cuda_spec())
    monkeypatch.setattr(linear, "cuda_capability", lambda device: 70)
    assert "needs compute capability 7.5, this card has 7.0" in kernel.can_implement(cuda_spec())
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in kernel.can_implement(cuda_spec())


def test_act_order_gathers_activations() -> None:
    weight = make_weight(4, "zeros", 66, 128, 64)
    weight.perm = torch.randperm(128, generator=torch.Generator(DEVICE).manual_seed(5))
    x = activations(6, 128, torch.float16).view(2, 3, 128)
    y = linear.TritonIntKernel().apply(x, Prepared(shuffle(weight), TABLE, 1), None)
    assert y.shape == (2, 3, 66)
    check(y.view(6, 66), x.view(6, 128), weight)


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
def test_every_card_has_a_table(cc: int) -> None:
    chosen = table("a card without its own table", cc)
    assert chosen.min_cc <= cc
    assert (
        chosen.dequantize_rows == chosen.gemv_rows + 1
        or chosen.tile(chosen.dequantize_rows - 1).rows >= 128
    )


def test_split_fills_the_card_and_no_more() -> None:
    assert split_k(64, 32, 132) == 4
    assert split_k(1000, 32, 132) == 1
    assert split_k(1, 2, 132) == 1
