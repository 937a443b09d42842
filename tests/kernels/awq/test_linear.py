"""AWQ's layer in the interpreter: a scale and a zero point in one word."""

import pytest
import torch
from kernel_cases import activations, make_weight, on_device  # noqa: F401  (a fixture)
from kernel_cases import check_product as check

from nibble.kernels.awq.linear import AwqKernel, repack
from nibble.kernels.dequant_gemm.linear import Prepared
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.errors import KernelArgumentError

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


def test_a_word_holds_a_groups_scale_and_zero_point() -> None:
    weight = make_weight(4, "zeros", 3, 200, 32)
    words = repack(weight).scales
    assert words.shape == (8, 128) and words.dtype == torch.int32
    word = int(words[2, 1])
    assert word & 0xFFFF == int(weight.zeros[1, 2])
    assert word >> 16 == int(weight.scales[1, 2].view(torch.int16))
    assert not words[7].any() and not words[:, 3:].any()


def test_a_weight_without_zero_points_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match="without zero points"):
        repack(make_weight(4, "mid", 3, 200, 32))


@pytest.mark.parametrize("scale", [1.0, 2.0**-14])
def test_scales_in_bfloat16(scale: float) -> None:
    """Below what float16 holds, too."""
    weight = make_weight(4, "zeros", 70, 128, 32, torch.bfloat16)
    weight.scales = weight.scales * scale
    x = activations(6, 128, torch.float16).view(3, 2, 128)
    y = AwqKernel().apply(x, Prepared(repack(weight), TABLE, 1), None)
    check(y.view(6, 70), x.view(6, 128), weight)
