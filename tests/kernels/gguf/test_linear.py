"""Weights with minima, and with scales that 16 bits do not hold, in the interpreter."""

import pytest
import torch
from kernel_cases import activations, make_weight, on_device  # noqa: F401  (a fixture)
from kernel_cases import check_product as check

from nibble.kernels.dequant_gemm.linear import Prepared
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.gguf.linear import GgufKernel, repack

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


@pytest.mark.parametrize("zero", ["mid", "zeros", "mins"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float32_scales_are_kept(bits: int, zero: str) -> None:
    weight = make_weight(bits, zero, 64, 192, 32, torch.float32)
    packed = repack(weight)
    assert packed.scales.dtype == torch.float32 and packed.scales.shape[0] == 2
    for rows in (2, 5):
        x = activations(rows, 192, torch.float16)
        check(GgufKernel().apply(x, Prepared(packed, TABLE, 1), None), x, weight)
