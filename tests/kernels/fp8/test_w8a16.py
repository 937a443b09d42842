"""FP8 weights with 16-bit activations in the interpreter."""

import pytest
import torch
from kernel_cases import (
    ROUNDING,
    activations,
    make_fp8_weight,
    on_device,  # noqa: F401  (a fixture)
)
from kernel_cases import check_product as check

from nibble.kernels.dequant_gemm import launch
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.fp8.w8a16 import repack

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "inner", "block"), [(70, 192, (70, 192)), (64, 130, (1, 130)), (130, 256, (64, 128))]
)
def test_fp8_weights(out: int, inner: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_fp8_weight(out, inner, block)
    packed = repack(weight)
    x = activations(5, inner, dtype)
    check(launch.gemm(x, packed, None, Tile(64, 16, 64, 4, 2, swap=True), 1), x, weight)
    check(launch.gemv(x[:1], packed, None, TABLE, 1), x[:1], weight)
    dense = launch.dequantize(packed, dtype)
    assert torch.allclose(
        dense.double(), weight.dequantize(torch.float32).double(), rtol=ROUNDING[dtype], atol=1e-6
    )
