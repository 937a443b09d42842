"""Linear: what is fused, and that fusing changes nothing."""

import torch

from nibble.engine.backends.torch.linear import FusedLinear
from nibble.engine.backends.weights import Linear
from nibble.quant.weight import QuantizedWeight

CPU = torch.device("cpu")


def fp8(out: int, scale: float, inner: int = 48) -> QuantizedWeight:
    codes = torch.randn(out, inner, generator=torch.Generator().manual_seed(out)).to(
        torch.float8_e4m3fn
    )
    return QuantizedWeight(codes, torch.full((1, 1), scale), bits=8, block=(out, inner), kind="fp8")


def test_parts_with_one_fp8_scale_each_are_one_product() -> None:
    parts = [fp8(32, 0.5), fp8(16, 0.25), fp8(16, 3.0)]
    linear = FusedLinear.build([Linear(part, None) for part in parts], torch.float32, CPU)
    assert len(linear.products) == 1
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    want = torch.cat([x @ part.dequantize().T for part in parts], dim=1)
    torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)


def test_parts_of_different_formats_stand_side_by_side() -> None:
    parts = [fp8(32, 0.5), torch.randn(16, 48)]
    linear = FusedLinear.build(
        [Linear(parts[0], None), Linear(parts[1], torch.ones(16))], torch.float32, CPU
    )
    assert len(linear.products) == 2
    x = torch.randn(3, 48)
    want = torch.cat([x @ parts[0].dequantize().T, x @ parts[1].T + 1], dim=1)
    torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)
