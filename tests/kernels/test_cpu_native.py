"""The C++ kernels against float64 products of the dequantized weight, for every instruction set of this machine."""

import pytest
import torch

from nibble.kernels.cpu import library
from nibble.kernels.cpu.prepared import PreparedGroup, prepare, quantize_head
from nibble.quant.weight import QuantizedWeight

pytestmark = pytest.mark.skipif(
    library.why_missing() is not None, reason=str(library.why_missing())
)

# out, in, group: tiles and groups in part, 576 columns, one group a row, groups wider than the kernels'
SHAPES = [
    (48, 128, 32),
    (33, 72, 24),
    (100, 576, 64),
    (40, 200, 128),
    (31, 576, 576),
    (16, 640, 256),
    (64, 96, 16),
]
INTEGERS = [
    (4, "mid"),
    (4, "zeros"),
    (4, "mins"),
    (3, "zeros"),
    (2, "mid"),
    (8, "mid"),
    (8, "zeros"),
    (6, "mid"),
    (4, "table"),
]
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
ROWS = (1, 3, 17, 33, 70)
INT8_ERROR, BF16_ERROR = (
    3e-3,
    2e-4,
)  # of the norm of |x| |W|: rounding to 8 bits by group; scales rounded to halves


@pytest.fixture(scope="module", params=library.instruction_sets())
def pool(request) -> library.Pool:
    return library.Pool(2, request.param)


def make_integer(
    n: int, k: int, group: int, bits: int, zero: str, permuted: bool = True
) -> QuantizedWeight:
    grid = (n, -(-k // group))
    return QuantizedWeight(
        torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        (torch.rand(grid) * 0.01 + 0.001).half(),
        zeros=torch.randint(0, 2**bits, grid, dtype=torch.uint8) if zero == "zeros" else None,
        mins=-torch.rand(grid) * 0.05 if zero == "mins" else None,
        perm=torch.randperm(k) if permuted else None,
        bits=bits,
        kind="table" if zero == "table" else "int",
        table=E2M1 if zero == "table" else None,
        block=(1, group),
    )


def error(
    got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None
) -> float:
    want = x.double() @ dense.double().T + (0 if bias is None else bias)
    return float((got - want).norm() / (x.double().abs() @ dense.double().abs().T).norm())


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_weights(pool: library.Pool, shape: tuple[int, int, int], int8: bool) -> None:
    torch.manual_seed(0)
    for bits, zero in INTEGERS:
        weight, bias = make_integer(*shape, bits, zero), torch.randn(shape[0])
        group = PreparedGroup([prepare(weight, bias)], int8)
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).bfloat16()
            assert error(group(pool, x), x, weight.dequantize(), bias) < (
                INT8_ERROR if int8 else BF16_ERROR
            )


@pytest.mark.parametrize("block", [(1, 640), (640, 640), (32, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("n, k", [(48, 128), (33, 200), (100, 576)])
def test_fp8_and_dense_weights(pool: library.Pool, n: int, k: int, block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[codes.float().isfinite()]  # every one, subnormal ones too
    fp8 = QuantizedWeight(
        finite[torch.randint(0, len(finite), (n, k))],
        torch.rand(-(-n // block[0]), -(-k // block[1])),
        kind="fp8",
        bits=8,
        block=block,
    )
    dense = torch.randn(n, k).bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, k).bfloat16()
        assert error(PreparedGroup([prepare(fp8)], True)(pool, x), x, fp8.dequantize()) < 1e-6
        assert error(PreparedGroup([prepare(dense)], True)(pool, x), x, dense) < 1e-6


def test_a_row_gives_the_same_in_every_batch(pool: library.Pool) -> None:
    torch.manual_seed(0)
    x = torch.randn(67, 576).bfloat16()
    for weight in (
        make_integer(100, 576, 64, 4, "zeros"),
        make_integer(100, 576, 32, 8, "mins"),
        make_integer(100, 576, 16, 4, "table"),
        torch.randn(100, 576).bfloat16(),
    ):
        for int8 in (True, False):
            group = PreparedGroup([prepare(weight)], int8)
            assert torch.equal(group(pool, x), torch.cat([group(pool, row[None]) for row in x]))


def test_a_group_of_different_formats_and_orders(pool: library.Pool) -> None:
    torch.manual_seed(0)
    weights = [
        make_integer(48, 128, 32, 4, "zeros"),
        torch.randn(32, 128).bfloat16(),
        make_integer(40, 128, 64, 8, "mid"),
    ]
    x = torch.randn(5, 128).bfloat16()
    dense = torch.cat(
        [w.float() if isinstance(w, torch.Tensor) else w.dequantize() for w in weights]
    )
    assert error(PreparedGroup([prepare(w) for w in weights], True)(pool, x), x, dense) < INT8_ERROR


def test_not_a_number_stays_one(pool: library.Pool) -> None:
    x = torch.ones(3, 128)
    x[1, 7] = float("nan")
    for weight in (make_integer(48, 128, 32, 4, "zeros"), torch.randn(48, 128).bfloat16()):
        y = PreparedGroup([prepare(weight)], True)(pool, x)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_a_grid_the_kernels_do_not_know_is_dequantized(pool: library.Pool) -> None:
    weight = make_integer(48, 140, 20, 4, "zeros")
    x = torch.randn(5, 140).bfloat16()
    assert (
        error(PreparedGroup([prepare(weight)], True)(pool, x), x, weight.dequantize()) < 4e-3
    )  # bfloat16 weights


def test_an_8_bit_head_is_close_to_the_dense_one() -> None:
    weight = torch.randn(40, 200)
    quantized = quantize_head(weight).dequantize()
    assert (quantized - weight).norm() < 0.01 * weight.norm()


def test_many_threads_and_many_calls() -> None:
    """More threads than cores: every chunk is computed once, whoever is given the processor."""
    torch.manual_seed(0)
    pool, weight, x = library.Pool(7), make_integer(200, 64, 32, 4, "zeros"), torch.randn(2, 64)
    group = PreparedGroup([prepare(weight)], True)
    first = group(pool, x)
    assert all(torch.equal(group(pool, x), first) for _ in range(300))


def test_a_table_of_numbers_too_large_is_dequantized(pool: library.Pool) -> None:
    """As GGUF's IQ4_NL, from -127 to 113: more than a byte holds beside seven bits of sums."""
    weight = make_integer(48, 128, 32, 4, "table")
    weight.table = (*range(-127, 113, 16), 113)
    prepared = prepare(weight)
    assert prepared.format == library.DENSE
    x = torch.randn(3, 128).bfloat16()
    assert error(PreparedGroup([prepared], True)(pool, x), x, weight.dequantize()) < INT8_ERROR
