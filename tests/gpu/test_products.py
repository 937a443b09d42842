"""Compiled products on the shapes of real models, with this card's own table, against float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    BF16,
    DEVICE,
    HALF,
    activations,
    check_product,
    make_fp8_weight,
    make_weight,
    on_device,  # noqa: F401  (a fixture)
    repack,
)
from torch import Tensor

from nibble.kernels.awq.linear import CONFIGS
from nibble.kernels.dequant_gemm import launch
from nibble.kernels.dequant_gemm.tiles import table
from nibble.kernels.measure.timing import Card
from nibble.kernels.select import choose
from nibble.kernels.spec import LinearSpec
from nibble.quant.weight import QuantizedWeight

LLAMA_3_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
AWKWARD = [(576, 576), (1536, 576), (576, 1536), (200, 1000)]  # SmolLM2's; no multiple of any tile
ROWS = (1, 17, 64, 129, 300)  # a GEMV or the narrowest tile, each wider one, dequantization
# Sums of thousands of products on tensor cores: this much of the sum of magnitudes, some thousandths of a result.
ACCUMULATION = 2**-18
INTEGERS = [
    (4, "zeros", 128),
    (4, "mid", 128),
    (4, "mid", 64),
    (4, "mins", 32),
    (4, "zeros", 16),
    (3, "zeros", 128),
    (3, "mid", 32),
    (2, "zeros", 64),
    (8, "mid", 128),
    (8, "zeros", 32),
    (4, "mid", 4096),
]


def product(weight: QuantizedWeight, dtype: torch.dtype, bias: Tensor | None = None):
    """(kernel's name, x -> y) of whatever the engine would choose."""
    spec = LinearSpec.of(weight, dtype, DEVICE)
    kernel = choose(spec).kernel
    prepared = kernel.prepare(weight, spec)
    return kernel.name, lambda x: kernel.apply(x, prepared, bias)


def check_all_rows(weight: QuantizedWeight, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    name, multiply = product(weight, dtype, bias)
    assert name.endswith("-triton")
    for rows in ROWS:
        x = activations(rows, weight.in_features, dtype)
        y = multiply(x)
        if rows == ROWS[-1]:  # dequantized to 16 bits first
            check_product(y, x, weight, bias, 2**-8 if dtype == BF16 else 2**-10)
        else:
            check_product(y, x, weight, bias, ACCUMULATION)


@pytest.mark.parametrize(("bits", "zero", "group"), INTEGERS)
def test_integers(bits: int, zero: str, group: int) -> None:
    dtype = BF16 if torch.cuda.get_device_capability() >= (8, 0) else HALF
    check_all_rows(make_weight(bits, zero, 4096, 4096, group), dtype, torch.randn(4096).to(dtype))


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("shape", [*LLAMA_3_8B, *AWKWARD], ids=str)
def test_four_bits_on_the_shapes_of_models(shape: tuple[int, int], dtype: torch.dtype) -> None:
    group = 128 if shape[1] % 128 == 0 else 64
    check_all_rows(make_weight(4, "zeros", *shape, group), dtype)


@pytest.mark.parametrize(
    "block", [(1, 4096), (4096, 4096), (128, 128)], ids=["channel", "tensor", "block"]
)
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_fp8_weights_with_16_bit_activations(block: tuple[int, int], dtype: torch.dtype) -> None:
    check_all_rows(make_fp8_weight(4096, 4096, block), dtype)


@pytest.mark.parametrize(
    ("block", "act_quant"), [((1, 4096), "token"), ((4096, 4096), "token"), ((128, 128), "group")]
)
def test_fp8_as_the_format_asks(block: tuple[int, int], act_quant: str) -> None:
    """Whichever kernel serves: with FP8 activations each may be off by a sixteenth, their sum by a few hundredths."""
    weight = make_fp8_weight(6144, 4096, block, act_quant)
    _, multiply = product(weight, HALF)
    dense = weight.dequantize(torch.float32)
    for rows in (1, 16, 64, 300):
        x = activations(rows, 4096, HALF)
        want = x.float() @ dense.T
        assert float((multiply(x).float() - want).norm() / want.norm()) < 0.05


def test_act_order() -> None:
    weight = make_weight(4, "zeros", 4096, 4096, 128)
    weight.perm = torch.randperm(4096)
    _, multiply = product(weight, HALF)
    for rows in (1, 40):
        x = activations(rows, 4096, HALF)
        expected = weight.dequantize(torch.float32)  # columns in the original order
        want = x.double() @ expected.double().T
        assert float((multiply(x).double() - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_split_products_are_the_same_every_time(rows: int) -> None:
    """Splits arrive in any order and are added in one; afterwards every lock is free."""
    card = Card.of(torch.device("cuda", 0))
    chosen, weight = (
        table(card.name, card.cc, "int4", CONFIGS),
        repack(make_weight(4, "zeros", 4096, 14336, 128)),
    )
    x = activations(rows, 14336, HALF)

    def run() -> list[Tensor]:
        gemm = (
            [launch.gemm(x, weight, None, chosen.tile(rows), card.num_sms)] if chosen.gemm else []
        )
        gemv = [launch.gemv(x, weight, None, chosen, card.num_sms)] if rows <= 8 else []
        return gemm + gemv

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        assert not weight.locks.any()


def test_split_products_in_a_graph_with_others_beside() -> None:
    """What decoding does: the same weights again and again, captured."""
    weight, other = make_weight(4, "zeros", 4096, 4096, 128), make_weight(4, "mid", 6144, 4096, 128)
    (_, first), (_, second) = product(weight, HALF), product(other, HALF)
    x = activations(4, 4096, HALF)
    want = [first(x), second(x)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [(first(x), second(x)) for _ in range(3)]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for one, two in got:
        assert torch.equal(one, want[0]) and torch.equal(two, want[1])


def test_dequantization_is_the_definition() -> None:
    for bits, zero, group in INTEGERS:
        weight = make_weight(bits, zero, 576, 4096, group)
        dense = launch.dequantize(repack(weight), HALF)
        torch.testing.assert_close(
            dense.double(), weight.dequantize(torch.float32).double(), rtol=2**-10, atol=1e-5
        )


def test_many_rows_are_cublas() -> None:
    weight = make_weight(4, "zeros", 4096, 4096, 128)
    _, multiply = product(weight, HALF)
    x = activations(600, 4096, HALF)
    assert torch.equal(multiply(x), F.linear(x, launch.dequantize(repack(weight), HALF)))
