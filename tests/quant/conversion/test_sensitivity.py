"""Bits chosen per layer: the knapsack against brute force, the damage against a hand-made block, the files on disk."""

import itertools
import json
from functools import partial

import pytest
import torch

import nibble
from nibble.errors import UnsupportedError
from nibble.quant.algorithms import search
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.conversion.pipeline import quantize_checkpoint
from nibble.quant.conversion.recipe import Recipe
from nibble.quant.conversion.sensitivity import _relative, _rounded_run, distribute

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}


def total(damage, chosen):
    return sum(damage[stage][bits] for stage, bits in chosen.items())


def mean_bits(sizes, chosen):
    return sum(bits * sizes[stage] for stage, bits in chosen.items()) / sum(sizes.values())


def curves(seed):
    """Damage that falls with the bits, at a pace of its own for each stage, and sizes."""
    generator = torch.Generator().manual_seed(seed)
    damage, sizes = {}, {}
    for i in range(5):
        levels = torch.rand(4, generator=generator).cumprod(0) * 1.3**i
        damage[f"stage {i}",] = dict(zip((2, 3, 4, 8), levels.tolist(), strict=True))
        sizes[f"stage {i}",] = (10, 35, 15, 60, 20)[i]
    return damage, sizes


def every_choice(damage):
    """All there are."""
    for bits in itertools.product((2, 3, 4, 8), repeat=len(damage)):
        yield dict(zip(damage, bits, strict=True))


def corners(points):
    """The corners of the lower hull of points (spent, damage), by trying every pair."""
    best = {}
    for spent, damaged in points:
        best[spent] = min(damaged, best.get(spent, damaged))
    spents = sorted(best)
    at, found = spents[0], [spents[0]]
    while further := [x for x in spents if x > at and best[x] < best[at]]:
        at = min(further, key=lambda x: ((best[x] - best[at]) / (x - at), -x))
        found.append(at)
    return [(x, best[x]) for x in found]


@pytest.mark.parametrize("seed", range(5))
def test_damage_is_the_least_where_steps_fill_the_budget(seed):
    """There a greedy choice along the hulls is the best of all 1024 choices, which are tried one by one."""
    damage, sizes = curves(seed)
    weights = sum(sizes.values())
    points = [(mean_bits(sizes, c) * weights, total(damage, c)) for c in every_choice(damage)]
    wanted = corners([(round(spent), damaged) for spent, damaged in points])
    assert len(wanted) > 6
    for spent, least in wanted:
        chosen = distribute(damage, sizes, spent / weights + 1e-9)
        assert total(damage, chosen) == pytest.approx(least, rel=1e-9)
        assert mean_bits(sizes, chosen) * weights <= spent + 1e-6


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 3.7, 4.0, 8.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_kept_and_between_corners_the_loss_is_less_than_a_step(seed, average):
    """No line between two corners can be beaten, so the best lies above it; greedy is at most the next step away."""
    damage, sizes = curves(seed)
    weights = sum(sizes.values())
    chosen = distribute(damage, sizes, average)
    assert mean_bits(sizes, chosen) <= average
    points = [
        (round(mean_bits(sizes, c) * weights), total(damage, c)) for c in every_choice(damage)
    ]
    below = max(p for p in corners(points) if p[0] <= average * weights)
    assert total(damage, chosen) <= below[1] + 1e-12


def test_damage_is_relative_to_each_tokens_own_stream():
    signal = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    noise = torch.tensor([[0.0, 0.5], [0.05, 0.0]])
    assert _relative(noise, signal) == pytest.approx((0.01 + 0.01) / 2)
    assert _relative(noise, 10 * signal) == pytest.approx((0.0001 + 0.0001) / 2)
    assert _relative(noise, torch.zeros(2, 2)) > 1e20  # and no error


def test_a_block_is_rounded_one_stage_at_a_time_and_is_as_before_afterwards():
    """What the stage adds, computed from dequantized weights by hand."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Linear(32, 32, bias=False) for _ in range(2))

        def forward(self, x, gain):
            return (x + self.down(self.up(x)) * gain,)

    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 32)
    importance = torch.rand(32) + 0.1
    before = {name: weight.clone() for name, weight in block.named_parameters()}
    with torch.no_grad():
        got = _rounded_run(block, ("down",), x, {"gain": 2.0}, [importance], (3, 16, True))
    rounded = search.quantize(before["down.weight"], importance, 3, 16, True).dequantize()
    torch.testing.assert_close(got, x + x @ before["up.weight"].T @ rounded.T * 2.0)
    assert all(torch.equal(before[name], weight) for name, weight in block.named_parameters())


def test_bits_that_do_not_help_are_not_spent():
    damage = {("a",): {2: 1.0, 3: 1.0, 4: 1.1, 8: 0.9}, ("b",): {2: 5.0, 4: 1.0}}
    assert distribute(damage, {("a",): 1, ("b",): 1}, 3.0) == {("a",): 2, ("b",): 4}


def test_the_checkpoint_keeps_the_budget_and_fused_layers_agree(dense, tmp_path):
    out = convert(dense, tmp_path / "out", "gptq", auto_bits=3.5, group_size=32, **FAST)
    checkpoint = open_checkpoint(out)
    weights = {m: checkpoint.linear(m) for m in checkpoint.modules() if checkpoint.is_quantized(m)}
    assert len(weights) == 14
    spent = sum(w.bits * w.codes.numel() for w in weights.values()) / sum(
        w.codes.numel() for w in weights.values()
    )
    assert 3 < spent <= 3.5
    assert len({w.bits for w in weights.values()}) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({weights[f"{block}.self_attn.{n}_proj"].bits for n in "qkv"}) == 1
        assert weights[f"{block}.mlp.gate_proj"].bits == weights[f"{block}.mlp.up_proj"].bits
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert {rule["bits"] for rule in dynamic.values()} <= {2, 3, 8}


def test_progress_and_plan_tell_what_is_chosen(dense, tmp_path):
    seen, plans = [], []
    report = quantize_checkpoint(
        dense,
        tmp_path / "out",
        Recipe.of("gptq", group_size=32, auto_bits=4.5),
        progress=seen.append,
        announce=plans.append,
        **FAST,
    )
    assert [p.doing for p in seen] == ["Choosing bits"] * 2 + ["Quantizing"] * 3
    assert plans[0].bits == report.plan.bits and "bits in" in plans[0].notes[-1]


def test_what_a_format_cannot_mix_is_refused():
    with pytest.raises(UnsupportedError, match="--auto-bits needs --gptq"):
        Recipe.of("awq", auto_bits=3.5)
    with pytest.raises(UnsupportedError, match="give no --bits"):
        Recipe.of("gptq", 4, auto_bits=3.5)
    with pytest.raises(
        UnsupportedError, match="--auto-bits 1.5 is not possible: gptq holds 2, 3, 4, 8 bits"
    ):
        Recipe.of("gptq", auto_bits=1.5)
    assert Recipe.of("gptq", auto_bits=5, target="compressed-tensors").widths == (4, 8)
