"""Every kernel that says it can, against float64 arithmetic on the definition in quant/weight.py."""

import itertools

import pytest
import torch

from nibble.kernels.select import KERNELS, choose
from nibble.kernels.spec import LinearSpec
from nibble.quant.weight import QuantizedWeight

CPU = torch.device("cpu")
SHAPES = [
    (48, 128, 32),
    (576, 576, 64),
    (16, 96, 32),
    (127, 65, 65),
    (64, 80, 32),
]  # (out, in, group)
# bf16: 8 bits of mantissa in scales, activations and result; float32: summation order alone.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def make_int(
    out: int, inner: int, group: int, bits: int, zero: str, permuted: bool
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(out * inner + bits)
    groups = -(-inner // group)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (out, inner), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(out, groups, generator=generator) - 0.3).half()
        * 0.1,  # negative scales too
        zeros=torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, generator=generator)
        if zero == "zeros"
        else None,
        mins=torch.randn(out, groups, generator=generator) if zero == "mins" else None,
        perm=torch.randperm(inner, generator=generator) if permuted else None,
        bits=bits,
        block=(1, group),
    )


def float64_weight(w: QuantizedWeight) -> torch.Tensor:
    """The definition, element by element."""
    dense = torch.zeros(w.out_features, w.in_features, dtype=torch.float64)
    for row, col in itertools.product(range(w.out_features), range(w.in_features)):
        r, c = row // w.block[0], col // w.block[1]
        code, scale = float(w.codes[row, col]), float(w.scales[r, c])
        if w.kind == "fp8":
            value = code * scale
        elif w.mins is not None:
            value = code * scale + float(w.mins[r, c])
        else:
            value = (
                code - (float(w.zeros[r, c]) if w.zeros is not None else 2 ** (w.bits - 1))
            ) * scale
        dense[row, int(w.perm[col]) if w.perm is not None else col] = value
    return dense


@pytest.mark.parametrize(
    ("bits", "zero"), [(4, "mid"), (4, "zeros"), (4, "mins"), (2, "zeros"), (3, "mid"), (8, "mid")]
)
@pytest.mark.parametrize("permuted", [False, True])
def test_dequantize_is_the_definition(bits: int, zero: str, permuted: bool) -> None:
    weight = make_int(6, 80, 32, bits, zero, permuted)
    assert torch.allclose(
        weight.dequantize().double(), float64_weight(weight), rtol=1e-6, atol=1e-7
    )


def test_fp8_blocks_dequantize_by_the_definition() -> None:
    codes = torch.randn(5, 7).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes, torch.rand(2, 3), kind="fp8", bits=8, block=(3, 3))
    assert torch.allclose(weight.dequantize().double(), float64_weight(weight), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_kernels_agree_with_float64(
    dtype: torch.dtype, shape: tuple[int, int, int], permuted: bool
) -> None:
    for bits, zero in [(4, "mid"), (4, "zeros"), (4, "mins"), (3, "zeros"), (8, "mid")]:
        weight = make_int(*shape, bits, zero, permuted)
        spec = LinearSpec.of(weight, dtype, CPU)
        dense, bias = weight.dequantize().double(), torch.randn(shape[0]).to(dtype)
        for rows in (1, 3, 17):
            x = torch.randn(rows, shape[1]).to(dtype)
            want = x.double() @ dense.T + bias.double()
            size = (
                x.double().abs() @ dense.abs().T + bias.double().abs()
            )  # what rounding errors are relative to
            for kernel in KERNELS:
                if kernel.can_implement(spec) is None:
                    got = kernel.apply(x, kernel.prepare(weight, spec), bias)
                    error = (got.double() - want).norm() / size.norm()
                    assert error < TOLERANCE[dtype], (
                        f"{kernel.name} {spec} rows={rows}: {error:.2e}"
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_kernels(dtype: torch.dtype) -> None:
    weight = torch.randn(33, 65).to(dtype)
    spec = LinearSpec.of(weight, dtype, CPU)
    x = torch.randn(5, 65).to(dtype)
    want = x.double() @ weight.double().T
    for kernel in KERNELS:
        if kernel.can_implement(spec) is None:
            error = (
                kernel.apply(x, kernel.prepare(weight, spec), None).double() - want
            ).norm() / want.norm()
            assert error < TOLERANCE[dtype], kernel.name


def test_every_refusal_has_a_reason_a_user_can_act_on() -> None:
    choice = choose(LinearSpec.of(make_int(48, 128, 16, 4, "zeros", False), torch.bfloat16, CPU))
    reasons = dict(choice.refused)
    assert "--group-size 64" in reasons["cpu-torch-int4"]
    assert choice.kernel.name.startswith("dequantize-once")


def test_a_gpu_keeps_the_memory_quantization_saved() -> None:
    spec = LinearSpec.of(
        make_int(48, 128, 32, 4, "zeros", False), torch.bfloat16, torch.device("cuda")
    )
    kernel = choose(spec).kernel
    assert kernel.name == "torch-dequantize"
