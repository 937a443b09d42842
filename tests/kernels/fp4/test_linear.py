"""FP4 weights in the interpreter: every code, MXFP4's powers of two and NVFP4's scales."""

import pytest
import torch
from kernel_cases import (  # noqa: F401  (a fixture)
    DEVICE,
    ROUNDING,
    activations,
    make_fp4_weight,
    on_device,
)
from kernel_cases import check_product as check

from nibble.kernels.dequant_gemm import launch
from nibble.kernels.dequant_gemm.linear import Prepared
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.kernels.fp4.linear import Fp4Kernel, repack
from nibble.kernels.spec import LinearSpec

TABLE = Table(
    80,
    gemv_rows=4,
    gemv_block_n=64,
    gemv_warps=4,
    dequantize_rows=40,
    gemm=(Tile(64, 16, 64, 4, 2),),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "inner", "group"), [(70, 160, 32), (64, 208, 16)])
def test_each_path_is_the_reference(out: int, inner: int, group: int, dtype: torch.dtype) -> None:
    weight = make_fp4_weight(out, inner, group)
    packed = repack(weight)
    assert packed.scales.dtype == (torch.int16 if group == 32 else torch.float32)
    x = activations(3, inner, dtype)
    check(launch.gemv(x, packed, None, TABLE, 1), x, weight)
    for swap in (False, True):
        check(launch.gemm(x, packed, None, Tile(64, 16, 64, 4, 2, swap), 1), x, weight)
    dense = launch.dequantize(packed, dtype)
    assert torch.allclose(dense.float(), weight.dequantize(), rtol=ROUNDING[dtype], atol=0)


def test_every_code_has_its_value() -> None:
    weight = make_fp4_weight(16, 32, 32)
    weight.codes = torch.arange(16, dtype=torch.uint8, device=DEVICE)[:, None].expand(16, 32)
    weight.scales = torch.full((16, 1), 0.5)
    dense = launch.dequantize(repack(weight), torch.float16)
    assert dense[:, 0].tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
        *(0, -0.5, -1, -1.5, -2, -3, -4, -6),
    ]


def test_the_smallest_scale_of_mxfp4_is_kept() -> None:
    weight = make_fp4_weight(64, 64, 32)
    weight.scales = torch.full((64, 2), 2.0**-128)
    packed = repack(weight)
    assert packed.scales.dtype == torch.int16 and packed.scales[0, 0] == 2**5


def test_another_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_fp4_weight(64, 64, 32)
    monkeypatch.setattr("nibble.kernels.fp4.linear.why_no_triton", lambda *given: None)
    kernel = Fp4Kernel()
    assert kernel.can_implement(LinearSpec.of(weight, torch.float16, DEVICE)) is None
    weight.table = tuple(range(16))
    assert "table" in str(kernel.can_implement(LinearSpec.of(weight, torch.float16, DEVICE)))


def test_many_rows_are_dequantized() -> None:
    weight = make_fp4_weight(66, 64, 32)
    x = activations(41, 64, torch.float16)
    y = Fp4Kernel().apply(x, Prepared(repack(weight), TABLE, 1), None)
    want = x.double() @ weight.dequantize().double().T
    assert torch.allclose(y.double(), want, rtol=2**-9, atol=0.01)
