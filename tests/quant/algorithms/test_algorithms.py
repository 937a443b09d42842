"""The algorithms against what they claim: grids that hold their ends, errors that fall, folds that change nothing."""

import itertools
import math

import pytest
import torch

from nibble.quant.algorithms import awq, fp8, gptq, rtn, search


def correlated(tokens=512, features=128, seed=0):
    """Activations with a few loud channels and strong correlation, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    mix += torch.eye(features)
    loud = 1 + 20 * (torch.rand(features, generator=generator) < 0.05).float()
    return torch.randn(tokens, features, generator=generator) @ mix * loud


def weight_of(out=48, features=128, seed=1):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(quantized, weight, x):
    return ((quantized.dequantize() - weight) @ x.T).square().mean().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_error_is_at_most_half_a_step(bits, symmetric):
    weight = weight_of()
    q = rtn.quantize(weight, bits, 32, symmetric)
    half = q.scales.float().repeat_interleave(32, 1) / 2
    # an asymmetric zero point is rounded too, and a float16 scale may fall short of the range: one step in all
    assert ((q.dequantize() - weight).abs() <= 2 * half * (1 + 1e-3)).all()
    assert q.scales.dtype == torch.float16 and q.codes.max() <= 2**bits - 1
    assert (q.zeros is None) == symmetric


def test_group_of_one_sign_still_holds_zero():
    weight = torch.rand(4, 32) + 1.0
    q = rtn.quantize(weight, 4, 32, symmetric=False)
    assert (q.zeros == 0).all()
    assert (q.dequantize() - weight).abs().max() < 0.08


def test_min_zero_keeps_gptq_v1_in_range():
    weight = torch.rand(4, 32) + 1.0
    for q in (
        rtn.quantize(weight, 4, 32, False, min_zero=1),
        search.quantize(weight, None, 4, 32, False, min_zero=1),
    ):
        assert (q.zeros >= 1).all()
        assert (q.dequantize() - weight).abs().max() < 0.3


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e6])
def test_extreme_weights_give_finite_scales(value):
    weight = torch.full((2, 32), value)
    for quantize in (rtn.quantize, lambda *args: search.quantize(args[0], None, *args[1:])):
        for symmetric in (True, False):
            q = quantize(weight, 4, 32, symmetric)
            assert torch.isfinite(q.dequantize()).all() and (q.scales != 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_grids_turn_to_the_side_that_reaches_farther(bits, sign):
    """2**bits equally spaced values with one more on one side: only a grid of that many levels holds them all."""
    middle = 2 ** (bits - 1)
    values = sign * 0.25 * torch.arange(-middle, middle).float()
    q = search.quantize(values.repeat(3, 256 // 2**bits), None, bits, 256, True)
    assert torch.equal(q.dequantize(), values.repeat(3, 256 // 2**bits))
    assert q.zeros is None and (q.scales.sign() == sign).all()


def test_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        rtn.quantize(torch.zeros(4, 100), 4, 64, True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_never_loses_to_rounding_in_the_measure_it_optimises(bits, symmetric):
    weight, x = weight_of(), correlated()
    importance = x.square().mean(0)

    def weighted(q):
        return ((q.dequantize() - weight).square() * importance).sum().item()

    plain = weighted(rtn.quantize(weight, bits, 64, symmetric))
    assert weighted(search.quantize(weight, importance, bits, 64, symmetric)) < 0.95 * plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_gptq_beats_rounding_on_correlated_activations(bits, symmetric, group_size):
    weight, x = weight_of(), correlated()
    result = gptq.quantize(weight, x.T @ x / len(x), bits, group_size, symmetric)
    assert result.fallback is None and result.weight.perm is None
    assert output_error(result.weight, weight, x) < 0.6 * output_error(
        rtn.quantize(weight, bits, group_size, symmetric), weight, x
    )


def test_gptq_survives_dead_and_duplicate_channels_and_few_tokens():
    weight, x = weight_of(), correlated(tokens=8)
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    result = gptq.quantize(weight, x.T @ x / 8, 4, 64, True)
    assert result.fallback is None
    assert torch.isfinite(result.weight.dequantize()).all()


@pytest.mark.parametrize(
    ("hessian", "why"),
    [
        (torch.zeros(128, 128), "no activations"),
        (torch.full((128, 128), math.nan), "not finite"),
        (-torch.eye(128) * 9 + torch.eye(128)[0] * 2000, "positive definite"),
    ],
)
def test_gptq_falls_back_with_a_reason(hessian, why):
    result = gptq.quantize(weight_of(), hessian, 4, 64, False)
    assert why in result.fallback
    assert (result.weight.dequantize() - weight_of()).abs().max() < 0.03


def test_group_order_keeps_groups_whole():
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0))
    order = gptq.group_order(importance, 64).reshape(4, 64)
    assert sorted(order.flatten().tolist()) == list(range(256))
    assert (order // 64 == order[:, :1] // 64).all()
    assert (importance[order].diff(dim=1) <= 0).all()


def test_awq_scales_lower_the_output_error_and_identity_is_a_candidate():
    weight, x = weight_of(), correlated()
    hessian = x.T @ x / len(x)

    def error(scales):
        rounded = gptq.quantize(
            weight * scales, hessian / scales / scales[:, None], 4, 64, False
        ).weight.dequantize()
        return awq.hessian_loss(rounded / scales - weight, hessian)

    loss = awq.expected_loss(weight, gptq.unexplained_variance(hessian), 4, 64, False)
    found = awq.search_scales(x.abs().mean(0), awq.relative_magnitude([weight], 64), loss)
    assert found.loss < 0.95 * found.identity_loss
    assert found.loss == pytest.approx(loss(found.scales))
    assert error(found.scales) < 0.95 * error(torch.ones(128))
    useless = awq.search_scales(
        x.abs().mean(0), awq.relative_magnitude([weight], 64), lambda s: s.std().item()
    )
    assert torch.equal(useless.scales, torch.ones(128))


def test_awq_with_silent_channels_has_finite_scales():
    mean_abs = torch.zeros(64)
    mean_abs[3] = 100.0
    for ratio, duo in itertools.product((0, 0.5, 0.95), (True, False)):
        scales = awq.candidate(mean_abs, torch.full((64,), 0.3), ratio, duo)
        assert torch.isfinite(scales).all() and (scales > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_a_norm_is_exact_whatever_its_rounding(offset, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, generator=generator).to(dtype).float()
    weight[:3] = torch.tensor([0.0, -1.0, -0.99609375])
    stored, scales = awq.divide_norm(
        weight, torch.rand(256, generator=generator) * 4 + 0.05, offset, dtype
    )
    assert torch.equal(stored, stored.to(dtype).float())
    torch.testing.assert_close((stored + offset) * scales, weight + offset, rtol=1e-6, atol=1e-9)
    assert (scales > 0).all()


def test_heads_share_scales_with_the_queries_that_read_them():
    per_kv = torch.arange(6.0)  # 2 kv heads of 3 channels
    repeated = awq.repeat_over_heads(per_kv, 4, 3)
    assert repeated.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert torch.equal(awq.share_over_heads(repeated, 2, 3), per_kv)


def test_fp8_maps_each_row_to_the_whole_range():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 3, 8
    ).unsqueeze(1)
    weight[2] = 0
    q = fp8.quantize(weight)
    assert q.kind == "fp8" and q.act_quant == "token" and q.codes.dtype == torch.float8_e4m3fn
    assert q.codes.float().abs().amax(1).tolist() == [448, 448, 0, 448, 448, 448, 448, 448]
    # e4m3 keeps 3 bits of mantissa: a relative error of at most 2^-4 for normal numbers
    error, small = (q.dequantize() - weight).abs(), weight.abs().amax(1, keepdim=True) / 448 * 2**-6
    assert (error <= torch.maximum(weight.abs() / 16, small) + 1e-12).all()
