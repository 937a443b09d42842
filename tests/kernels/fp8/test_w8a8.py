"""FP8 activations times FP8 weights under Triton's interpreter, against float64 products of the dequantized codes.

The activations are quantized here by torch's own conversion. What a product may differ by: float32 sums of K terms,
together within K * 2**-24 of the sum of magnitudes whatever their order; three roundings more, for the scales; and that
of the result to 16 bits. Products of codes are exact in float32: the interpreter decodes them first, in place of FP8
tensor cores.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from nibble.kernels import device, select
from nibble.kernels.errors import KernelArgumentError
from nibble.kernels.fp8 import launch, w8a8
from nibble.kernels.fp8.layout import Fp8Weight, fp8_weight
from nibble.kernels.fp8.tiles import Table, Tile, table
from nibble.kernels.fp8.w8a8 import Fp8W8A8Kernel, Prepared
from nibble.kernels.spec import LinearSpec
from nibble.quant.weight import QuantizedWeight

PLAIN, SWAP = Tile(64, 16, 64, 128, 4, 2), Tile(64, 16, 64, 128, 4, 2, swap=True)
TABLE = Table(89, quantize_rows=4, promote=True, gemm=(SWAP, PLAIN))
HALF = {
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7,
}  # the interpreter cuts float32 down to bfloat16, unrounded
FP8 = torch.float8_e4m3fn


def make(out: int, inner: int, block: tuple[int, int], act: str = "token") -> QuantizedWeight:
    generator = torch.Generator().manual_seed(out + inner + block[0])
    codes = torch.randint(0, 256, (out, inner), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0x7E  # NaN; all other codes stand, subnormals too
    scales = (
        torch.rand(-(-out // block[0]), -(-inner // block[1]), generator=generator) / 100 + 1e-3
    )
    return QuantizedWeight(
        codes.view(FP8),
        scales,
        kind="fp8",
        bits=8,
        block=block,
        act_quant=act,
        input_scale=torch.tensor([0.004]) if act == "tensor" else None,
    )


def activations(rows: int, inner: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))
    x[:, ::17] *= 30  # outliers
    x[0, : inner // 2] *= 1e-3
    return x.to(dtype)


def quantized(
    x: torch.Tensor, group: int, static: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as float32, their scale of each element), a scale per row and `group` features."""
    scale = torch.empty(x.shape)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group].float()
        largest = part.abs().amax(1, keepdim=True) / 448
        scale[:, start : start + group] = largest.clamp(min=2.0**-100) if static is None else static
    return (x.float() * (1 / scale)).clamp(-448, 448).to(FP8).float(), scale


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight,
    group: int,
    bias: torch.Tensor | None = None,
) -> None:
    codes, scale = quantized(x, group, weight.input_scale)
    used, dense = codes.double() * scale.double(), weight.dequantize(torch.float32).double()
    want = used @ dense.T + (0 if bias is None else bias.double())
    bound = (
        used.abs() @ dense.abs().T * (x.shape[1] + 3) * 2**-24 + want.abs() * HALF[x.dtype] + 1e-6
    )
    assert y.dtype == x.dtype and y.shape == want.shape
    assert ((y.double() - want).abs() <= bound).all(), (y.double() - want).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "group"), [(1, 576, 0), (3, 130, 0), (2, 576, 128), (3, 100, 64)]
)
def test_codes_are_torchs(rows: int, inner: int, group: int, dtype: torch.dtype) -> None:
    x = activations(rows, inner, dtype)
    codes, scales = launch.quantize(x, group)
    want, scale = quantized(x, group or inner)
    assert torch.equal(codes.float(), want)
    assert torch.equal(scales, scale[:, :: group or inner])


def test_static_scale_saturates_and_keeps_nan() -> None:
    x = torch.tensor([[1e4, -1e4, float("inf"), 0.5, float("nan"), 2.0**-9]]).half()
    codes, scales = launch.quantize(x, 0, torch.tensor([1.0]))
    assert codes.float()[0, :4].tolist() == [448, -448, 448, 0.5] and codes.float()[0, 4].isnan()
    assert codes.float()[0, 5] == 2**-9 and scales.shape == (1, 1)


def test_broken_row_is_broken_alone() -> None:
    weight, x = fp8_weight(make(64, 128, (1, 128))), activations(2, 128)
    x[0, 3] = float("nan")
    for scales in (None, launch.quantize(x, 0)):
        used = (x, None) if scales is None else scales
        y = launch.gemm(*used, weight, None, torch.float16, SWAP, True, 1)
        assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("tile", [PLAIN, SWAP], ids=["plain", "swap"])
@pytest.mark.parametrize(
    ("rows", "out", "inner", "block", "act", "promote"),
    [
        (1, 64, 256, (64, 256), "token", True),
        (3, 70, 576, (1, 576), "token", False),
        (17, 33, 130, (1, 130), "token", True),
        (33, 65, 200, (65, 200), "tensor", False),
        (3, 200, 576, (128, 128), "group", True),
        (17, 130, 300, (128, 128), "group", False),
        (2, 70, 192, (48, 64), "group", False),
        (3, 130, 256, (128, 128), "token", False),
        (5, 66, 256, (1, 128), "group", True),
        (2, 64, 96, (128, 128), "group", True),
    ],
)
def test_products_are_the_reference(
    rows: int, out: int, inner: int, block: tuple[int, int], act: str, promote: bool, tile: Tile
) -> None:
    """Codes handed in, and rows that the product quantizes itself, a scale per tile of K."""
    weight, x = make(out, inner, block, act), activations(rows, inner)
    prepared = fp8_weight(weight)
    codes, scales = launch.quantize(x, prepared.x_group, prepared.input_scale)
    y = launch.gemm(codes, scales, prepared, None, x.dtype, tile, promote, 1)
    check(y, x, weight, prepared.x_group or inner)
    check(launch.gemm(x, None, prepared, None, x.dtype, tile, promote, 1), x, weight, prepared.step)


def test_bfloat16_with_bias_and_many_tiles() -> None:
    """More tiles of rows than are grouped for L2, the last group incomplete."""
    weight, x = make(100, 128, (1, 128)), activations(16 * 9 + 3, 128, torch.bfloat16)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = launch.gemm(*launch.quantize(x, 0), fp8_weight(weight), bias, x.dtype, PLAIN, True, 1)
    check(y, x, weight, 128, bias)


@pytest.mark.parametrize("act", ["token", "group"])
def test_split_along_k_adds_up_and_leaves_its_locks_free(act: str) -> None:
    weight, x = (
        make(100, 1024, (128, 128) if act == "group" else (1, 1024), act),
        activations(5, 1024),
    )
    prepared, bias = fp8_weight(weight), torch.randn(100).half()
    codes, scales = launch.quantize(x, prepared.x_group)
    first = launch.gemm(codes, scales, prepared, bias, x.dtype, SWAP, True, num_sms=8)
    check(first, x, weight, prepared.x_group or 1024, bias)
    assert not prepared.locks.any()
    assert torch.equal(
        first, launch.gemm(codes, scales, prepared, bias, x.dtype, SWAP, True, num_sms=8)
    )


def test_narrow_tiles_step_through_wide_groups() -> None:
    weight, x = make(128, 256, (128, 128), "group"), activations(3, 256)
    prepared = fp8_weight(weight)
    y = launch.gemm(
        *launch.quantize(x, 128), prepared, None, x.dtype, Tile(64, 16, 128, 64, 4, 2), True, 1
    )
    check(y, x, weight, 128)


@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_rows_choose_the_path(rows: int) -> None:
    weight, x = make(66, 256, (1, 256)), activations(max(rows, 1), 256)[:rows]
    prepared = Prepared(fp8_weight(weight), TABLE, 1)
    y = Fp8W8A8Kernel().apply(x.view(1, rows, 256), prepared, None)
    assert y.shape == (1, rows, 66)
    check(y[0], x, weight, 128 if rows <= TABLE.quantize_rows else 256)


def test_whole_rows_are_used_without_a_copy() -> None:
    weight = make(64, 256, (1, 256))
    assert fp8_weight(weight).codes.data_ptr() == weight.codes.data_ptr()
    padded = fp8_weight(make(64, 576, (1, 576))).codes
    assert padded.shape == (64, 640) and not padded[:, 576:].float().any()


def test_arguments_are_checked() -> None:
    prepared: Fp8Weight = fp8_weight(make(64, 256, (128, 128), "group"))
    codes, scales = torch.zeros(2, 256, dtype=FP8), torch.ones(2, 2)

    def gemm(x: torch.Tensor, x_scales: torch.Tensor | None) -> None:
        launch.gemm(x, x_scales, prepared, None, torch.float16, PLAIN, True, 1)

    with pytest.raises(KernelArgumentError, match="rows of 256 contiguous features"):
        gemm(codes[:, :128], scales)
    with pytest.raises(KernelArgumentError, match="float16, bfloat16, or e4m3 codes"):
        gemm(codes.float(), None)
    with pytest.raises(KernelArgumentError, match="must be float8_e4m3fn and scales float32"):
        gemm(codes, scales.half())
    with pytest.raises(KernelArgumentError, match=r"\(2, 2\), one per 128 features"):
        gemm(codes, torch.ones(2, 3))


def spec_of(**changes) -> LinearSpec:
    spec = LinearSpec.of(make(64, 256, (128, 128), "group"), torch.bfloat16, torch.device("cuda"))
    return dataclasses.replace(spec, **changes)


def test_refusals_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Fp8W8A8Kernel()
    assert "CUDA device, not on cpu" in kernel.can_implement(spec_of(device=torch.device("cpu")))
    for module in (w8a8, device):
        monkeypatch.setattr(module, "cuda_capability", lambda device: 90)
    assert kernel.can_implement(spec_of()) is None
    assert select.choose(spec_of()).kernel.name == "fp8-w8a8-triton"
    assert "not int" in kernel.can_implement(spec_of(kind="int"))
    assert "weights alone" in kernel.can_implement(spec_of(act_quant="none"))
    assert select.choose(spec_of(act_quant="none")).kernel.name == "fp8-w8a16-triton"
    assert "multiple of 32 columns, not 48" in kernel.can_implement(spec_of(block=(1, 48)))
    assert "up to 32768 features" in kernel.can_implement(spec_of(in_features=53248))
    assert "their own order" in kernel.can_implement(spec_of(permuted=True))
    assert "16-bit activations" in kernel.can_implement(spec_of(act_dtype=torch.float32))
    monkeypatch.setattr(w8a8, "cuda_capability", lambda device: 86)
    assert "this card has 8.6" in kernel.can_implement(spec_of())
    assert select.choose(spec_of()).kernel.name == "fp8-w8a16-triton"


@pytest.mark.parametrize("cc", [89, 90, 100, 120])
def test_every_card_with_fp8_has_a_table(cc: int) -> None:
    chosen = table("a card without its own table", cc)
    assert chosen.min_cc <= cc and chosen.quantize_rows >= 16
    assert [tile.rows for tile in chosen.gemm] == sorted(tile.rows for tile in chosen.gemm)
