"""The searches against plain loops in float64: the best range of a group, its best scale, the loss of AWQ's scales."""

import math

import pytest
import torch

from nibble.quant.algorithms import awq, rtn, search


def cost(values, importance, scale: float, zero: float, bits: int) -> float:
    """What rounding values to a grid costs, weighted: element by element."""
    total = 0.0
    for value, weight in zip(values.tolist(), importance.tolist(), strict=True):
        code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
        total += weight * ((code - zero) * scale - value) ** 2
    return total


def outliers(seed: int):
    """A group of 64 with a few values far out, and importance that lies elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(64, generator=generator) * 0.02
    values[:2] = torch.tensor([0.2, -0.2])
    importance = torch.rand(64, generator=generator) + 0.05
    importance[:2] = 1e-3
    return values, importance


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_shrunken_range_is_better_than_the_one_found(seed, bits, symmetric):
    values, importance = outliers(seed)
    scales, zeros = search.fit_grid(values.view(1, 1, -1), importance.view(1, -1), bits, symmetric)
    found = cost(values, importance, scales.item(), zeros.item(), bits)
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    levels = 2**bits - 1
    others = []
    for percent in range(40, 101):
        if symmetric:
            scale, zero = 2 * max(-low, high) * percent / 100 / levels, 2 ** (bits - 1)
        else:
            scale = (high - low) * percent / 100 / levels
            zero = round(-low * percent / 100 / scale)
        others.append(cost(values, importance, scale, zero, bits))
    assert found <= 1.02 * min(others) < 0.7 * others[-1]


@pytest.mark.parametrize("seed", range(3))
def test_the_refitted_scale_is_the_best_for_its_codes(seed):
    values, importance = outliers(seed)
    steps = (values / 0.011).round().clamp(-4, 3)
    fitted = search._refit(
        values.view(1, 1, -1), importance.view(1, -1), steps.view(1, 1, -1), torch.tensor([[0.011]])
    ).item()

    def weighted(scale: float) -> float:
        return (importance.double() * (steps * scale - values).double().square()).sum().item()

    best = min(range(5000, 20000), key=lambda i: weighted(i * 1e-6)) * 1e-6
    assert fitted == pytest.approx(best, rel=1e-3)  # float16
    plain = min(range(5000, 20000), key=lambda i: (steps * i * 1e-6 - values).square().sum()) * 1e-6
    assert abs(plain / best - 1) > 0.005  # importance matters here


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest_on_the_grid_that_is_stored(symmetric):
    """float16 scales: a code picked with a finer one would be off by a step near the end of 8 bits."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q = rtn.quantize(weight, 8, 128, symmetric)
    scales = q.scales.double().repeat_interleave(128, 1)
    zeros = 128 if symmetric else q.zeros.double().repeat_interleave(128, 1)
    off = (q.codes.double() - zeros - weight.double() / scales).abs()
    inside = (q.codes > 0) & (q.codes < 255)
    assert off[inside].max() <= 0.5 + 1e-4


def test_the_grid_of_a_group_spans_it():
    """Every value within half a step, but for the rounding of zero point and scale."""
    weight = torch.rand(32, 128, generator=torch.Generator().manual_seed(0)) * 3 - 1
    q = rtn.quantize(weight, 4, 64, symmetric=False)
    low, high = weight.reshape(32, 2, 64).amin(-1), weight.reshape(32, 2, 64).amax(-1)
    torch.testing.assert_close(q.scales.float(), (high - low) / 15, rtol=1e-3, atol=0)
    assert torch.equal(q.zeros.float(), (-low / q.scales.float()).round())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_expected_loss_is_that_of_its_docstring(symmetric):
    """step^2 of the scaled weight's grid, times each column's variance over the square of its scale."""
    generator = torch.Generator().manual_seed(2)
    weight, variance = torch.randn(3, 8, generator=generator), torch.rand(8, generator=generator)
    scales = torch.rand(8, generator=generator) * 3 + 0.2
    expected = 0.0
    for row in range(3):
        for start in (0, 4):
            group = [float(weight[row, j] * scales[j]) for j in range(start, start + 4)]
            low, high = min(*group, 0.0), max(*group, 0.0)
            step = (2 * max(-low, high) if symmetric else high - low) / 15
            for j in range(start, start + 4):
                expected += step**2 * float(variance[j]) / float(scales[j]) ** 2
    loss = awq.expected_loss(weight, variance, 4, 4, symmetric)
    assert math.isclose(loss(scales), expected, rel_tol=2e-3)  # float16 steps


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folded_norm_is_scaled_by_what_was_asked_for(offset, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(64, generator=generator) + 0.5
    asked = torch.rand(64, generator=generator) * 1.5 + 0.5
    stored, scales = awq.divide_norm(weight, asked, offset, dtype)
    # storing w rounds it, which an offset's smaller factor 1 + w feels more
    spread = torch.finfo(dtype).eps * (1 + offset / (stored + offset).abs())
    assert ((scales / asked - 1).abs() <= 2 * spread).all()
