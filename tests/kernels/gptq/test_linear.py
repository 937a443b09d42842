"""GPTQ's layer in the interpreter: symmetric weights of every number of bits, act-order."""

import pytest
import torch
from kernel_cases import DEVICE, activations, make_weight, on_device  # noqa: F401  (a fixture)
from kernel_cases import check_product as check

from nibble.kernels.dequant_gemm import launch
from nibble.kernels.dequant_gemm.linear import Prepared
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.gptq.linear import GptqKernel, repack

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_symmetric_weights_have_their_zero_point_in_the_middle(
    bits: int, dtype: torch.dtype
) -> None:
    weight = make_weight(bits, "mid", 64, 320, 32, dtype)
    packed = repack(weight)
    assert int(packed.scales[0, 0]) & 0xFFFF == 2 ** (bits - 1)
    x = activations(3, 320, torch.float16)
    check(launch.gemv(x, packed, None, TABLE, 1), x, weight)
    check(launch.gemm(x, packed, None, Tile(64, 16, 64, 4, 2, swap=True), 1), x, weight)


@pytest.mark.parametrize("zero", ["mid", "zeros"])
def test_scales_below_float16_keep_their_bfloat16(zero: str) -> None:
    weight = make_weight(3, zero, 64, 128, 32, torch.bfloat16)
    weight.scales = weight.scales * 2.0**-14
    x = activations(2, 128, torch.float16)
    check(launch.gemv(x, repack(weight), None, TABLE, 1), x, weight)


@pytest.mark.parametrize("zero", ["mid", "zeros"])
def test_act_order_gathers_activations(zero: str) -> None:
    weight = make_weight(4, zero, 66, 128, 64)
    weight.perm = torch.randperm(128, generator=torch.Generator(DEVICE).manual_seed(5))
    x = activations(6, 128, torch.float16).view(2, 3, 128)
    y = GptqKernel().apply(x, Prepared(repack(weight), TABLE, 1), None)
    assert y.shape == (2, 3, 66)
    check(y.view(6, 66), x.view(6, 128), weight)
