"""What Triton needs of a machine, and which room's kernel the engine is given for a kind of weight."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from nibble.kernels import device, select
from nibble.kernels.spec import LinearSpec
from nibble.quant.weight import QuantizedWeight

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compute capability 8.0."""
    monkeypatch.setattr(device, "cuda_capability", lambda device: 80)


def test_refusals_have_reasons(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    why_not, half, bf16 = device.why_no_triton, torch.float16, torch.bfloat16
    assert why_not(CUDA, half) is None
    assert "CUDA device, not on cpu" in why_not(torch.device("cpu"), half)
    assert "16-bit activations" in why_not(CUDA, torch.float32)
    monkeypatch.setattr(device, "cuda_capability", lambda device: 75)
    assert why_not(CUDA, half) is None
    assert "bfloat16 needs compute capability 8.0" in why_not(CUDA, bf16)
    monkeypatch.setattr(device, "cuda_capability", lambda device: None)
    assert "sees no NVIDIA card" in why_not(CUDA, half)
    monkeypatch.setattr(device, "cuda_capability", lambda device: 70)
    assert "needs compute capability 7.5, this card has 7.0" in why_not(CUDA, half)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in why_not(CUDA, half)


def spec_of(bits: int, zero: str, permuted: bool = False, wide: bool = False) -> LinearSpec:
    scales = torch.rand(64, 2)
    weight = QuantizedWeight(
        torch.zeros(64, 128, dtype=torch.uint8),
        scales if wide else scales.half(),
        torch.zeros(64, 2, dtype=torch.uint8) if zero == "zeros" else None,
        torch.zeros(64, 2) if zero == "mins" else None,
        torch.arange(128) if permuted else None,
        bits=bits,
        block=(1, 64),
    )
    return LinearSpec.of(weight, torch.float16, CUDA)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (spec_of(4, "zeros"), "awq-triton"),
        (spec_of(4, "zeros", permuted=True), "gptq-triton"),
        (spec_of(3, "zeros"), "gptq-triton"),
        (spec_of(8, "mid"), "gptq-triton"),
        (spec_of(4, "mid", permuted=True), "gptq-triton"),
        (spec_of(4, "mins"), "gguf-triton"),
        (spec_of(3, "mid", wide=True), "gguf-triton"),
        (spec_of(4, "zeros", permuted=True, wide=True), "gguf-triton"),
        (spec_of(6, "mid", wide=True), "torch-dequantize"),
        (spec_of(5, "mins"), "torch-dequantize"),
        (dataclasses.replace(spec_of(4, "zeros"), block=(1, 24)), "torch-dequantize"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kind_of_weight_has_its_room(card: None, spec: LinearSpec, name: str) -> None:
    assert select.choose(spec).kernel.name == name


def test_what_has_no_product_says_what_would_be_faster(card: None) -> None:
    reasons = dict(select.choose(spec_of(6, "mid", wide=True)).refused)
    assert "6-bit codes, which are dequantized on every call" in reasons["gguf-triton"]
    assert "Q4_K, Q8_0" in reasons["gguf-triton"]
    reasons = dict(select.choose(dataclasses.replace(spec_of(4, "zeros"), block=(1, 24))).refused)
    assert "multiples of 16 columns, not 24" in reasons["awq-triton"]
    reasons = dict(select.choose(spec_of(4, "mid")).refused)
    assert reasons["awq-triton"] == "needs zero points, not symmetric weights"
