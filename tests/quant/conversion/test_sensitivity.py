"""Bits chosen per layer: the knapsack against brute force, the damage against a hand-made block, the files on disk."""

import itertools
import json
from functools import partial

import pytest
import torch

import nibble
from nibble.errors import UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.conversion.pipeline import quantize_checkpoint
from nibble.quant.conversion.recipe import Recipe
from nibble.quant.conversion.sensitivity import distribute

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}


def total(damage, chosen):
    return sum(damage[stage][bits] for stage, bits in chosen.items())


def mean_bits(sizes, chosen):
    return sum(bits * sizes[stage] for stage, bits in chosen.items()) / sum(sizes.values())


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 3.7, 4.0, 8.0])
@pytest.mark.parametrize("seed", range(5))
def test_damage_is_nearly_the_least_that_the_budget_allows(average, seed):
    """On the hull greedy steps are optimal up to one step's worth; brute force over all choices is the judge."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(5, generator=generator).tolist()
    damage = {
        (str(i),): {bits: w * 4.0**-bits for bits in (2, 3, 4, 8)} for i, w in enumerate(weight)
    }
    sizes = {stage: 10 * (i % 3 + 1) for i, stage in enumerate(damage)}
    chosen = distribute(damage, sizes, average)
    assert mean_bits(sizes, chosen) <= average
    choices = (
        dict(zip(damage, bits, strict=True)) for bits in itertools.product((2, 3, 4, 8), repeat=5)
    )
    best = min(total(damage, c) for c in choices if mean_bits(sizes, c) <= average)
    assert total(damage, chosen) <= best + max(curve[2] - curve[3] for curve in damage.values())
    uniform = dict.fromkeys(damage, int(average) if average < 5 else 8)
    assert total(damage, chosen) <= total(damage, uniform) + 1e-12


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
