"""Mixtures of experts, converted: each expert by itself, what chooses them left alone, and what is served is what
transformers computes with the weights on disk."""

import json
import re
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.quant import card
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.conversion import calibration, experts, pipeline
from nibble.quant.conversion.blocks import BlockSource
from nibble.quant.conversion.pipeline import dry_run, quantize_checkpoint
from nibble.quant.conversion.recipe import Recipe

FAST = {"calib_samples": 4, "calib_seqlen": 32}
SIZES = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "n_shared_experts": 2}  # fmt: skip
FAMILIES = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 32},
    "mixtral": {},
    "granitemoe": {"residual_multiplier": 0.5},
    "dots1": {"n_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
}
RECIPES = {
    "awq": {"group_size": 32},
    "gptq": {"group_size": 16},
    "fp8": {"fp8_scheme": "tensor"},
}


@pytest.fixture
def make_moe(make_checkpoint):
    def make(family="qwen2_moe"):
        return make_checkpoint(family, family, **SIZES, **FAMILIES[family])

    return make


def logits(folder, ids):
    """By transformers, from the weights that a checkpoint stands for."""
    plain = folder.with_name(folder.name + "-plain")
    dequantize_checkpoint(open_checkpoint(folder), plain, torch.float32)
    if "granite" in (folder / "config.json").read_text():
        stack(plain / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def stack(file):
    """Granite's experts as transformers wants them."""
    tensors = load_file(file)
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate, down, up = (
            torch.stack([tensors.pop(f"{prefix}.experts.{e}.w{i}.weight") for e in range(4)])
            for i in (1, 2, 3)
        )
        tensors[f"{prefix}.input_linear.weight"] = torch.cat((gate, up), 1)
        tensors[f"{prefix}.output_linear.weight"] = down
    save_file(tensors, file, {"format": "pt"})


def served(folder, ids):
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 22)
    return Runner(config).logits(ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", RECIPES)
def test_what_is_served_is_what_transformers_computes_with_these_weights(
    make_moe, tmp_path, family, method
):
    folder, out, ids = make_moe(family), tmp_path / "out", list(range(3, 40))
    report = quantize_checkpoint(folder, out, Recipe.of(method, **RECIPES[method]), **FAST)
    want = logits(out, ids)
    assert torch.allclose(served(out, ids), want, atol=1e-4 * want.abs().max())
    before, after = torch.log_softmax(logits(folder, ids), -1), torch.log_softmax(want, -1)
    divergence = (before.exp() * (before - after)).sum(-1).median()
    assert divergence < (0.002 if method == "fp8" else 0.05)
    assert all(error < 0.1 for error in report.layer_error.values())


def test_each_expert_is_a_module_on_disk_and_what_chooses_them_is_not_quantized(make_moe, tmp_path):
    folder = make_moe("qwen2_moe")
    layer = "model.layers.1.mlp"
    for method, options in RECIPES.items():
        quantize_checkpoint(folder, tmp_path / method, Recipe.of(method, **options), **FAST)
        original, checkpoint = open_checkpoint(folder), open_checkpoint(tmp_path / method)
        assert checkpoint.modules() == original.modules()
        quantized = {m for m in checkpoint.modules() if checkpoint.is_quantized(m)}
        assert {f"{layer}.experts.3.{n}_proj" for n in ("gate", "up", "down")} <= quantized
        assert {f"{layer}.shared_expert.{n}_proj" for n in ("gate", "up", "down")} <= quantized
        assert len(quantized) == 2 * 4 + 3 + 3 * 4 + 3  # attention, the dense layer, experts
        for name in (f"{layer}.gate", f"{layer}.shared_expert_gate"):
            assert checkpoint.scheme.layer(name) is None
            if method == "fp8":  # the others fold the norm's scales into them
                assert torch.equal(
                    checkpoint.tensor(f"{name}.weight"), original.tensor(f"{name}.weight")
                )
        for name in quantized:
            assert checkpoint.scheme.layer(name) is not None
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert f"{layer}.gate" in config["modules_to_not_convert"]
    assert not any(name.endswith("_proj") for name in config["modules_to_not_convert"])
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert any(re.match(rule[2:], f"{layer}.gate") for rule in config["dynamic"])
    assert not any(re.match(rule[2:], f"{layer}.gate_proj") for rule in config["dynamic"])


def test_stacked_experts_are_written_one_by_one(make_moe, tmp_path):
    folder, out = make_moe("granitemoe"), tmp_path / "out"
    quantize_checkpoint(folder, out, Recipe.of("gptq", group_size=16), **FAST)
    names = open_checkpoint(out).names()
    layer = "model.layers.0.block_sparse_moe"
    assert {f"{layer}.experts.{e}.w{i}.qweight" for e in range(4) for i in (1, 2, 3)} <= names
    assert f"{layer}.router.layer.weight" in names


def test_what_is_kept_in_32_bits_stays_so(make_moe, tmp_path):
    folder, out = make_moe("dots1"), tmp_path / "out"
    quantize_checkpoint(folder, out, Recipe.of("fp8"), **FAST)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = (open_checkpoint(f).tensor(name) for f in (folder, out))
    assert before.dtype == after.dtype == torch.float32 and torch.equal(before, after)


def block_of(folder, index=1):
    source = BlockSource(open_checkpoint(folder), torch.device("cpu"))
    hidden = source.embed(torch.arange(3, 131).reshape(4, 32))
    return source, source.load(index), hidden, source.keyword_arguments(hidden[:1])[index]


def routing(block, hidden, arguments):
    """Of each token, what enters the experts and which it goes to, by transformers' own router."""
    seen = []
    block.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        block(hidden, **arguments)
    return seen[0]


@pytest.mark.parametrize("least", [0, 70])
@pytest.mark.parametrize("at_once", [None, 3])
def test_each_expert_sees_its_tokens_and_others_where_they_are_too_few(
    make_moe, monkeypatch, least, at_once
):
    source, block, hidden, arguments = block_of(make_moe("qwen3_moe"))
    entering, chosen = routing(block, hidden, arguments)
    monkeypatch.setattr(experts, "LEAST_TOKENS", least)
    monkeypatch.setattr(calibration, "HESSIAN_BYTES", 2 * 4 * 64**2)  # two experts at a time
    met, runs = {}, Counter()
    block.self_attn.register_forward_pre_hook(lambda *_: runs.update(["passes"]))
    calibration.run_quantizing(
        block,
        hidden,
        arguments,
        [[group[0] for group in stage] for stage in source.stages(1)],
        met.__setitem__,
        at_once,
    )
    assert list(met) == [group[0] for group in source.groups(1)] or at_once is None
    assert set(met) == {group[0] for group in source.groups(1)}
    # qkv; o; gates in twos; downs (32 wide) all at once; and all of it: in two parts each
    assert runs["passes"] == (1 if at_once is None else 2 * (2 + 2 + 1 + 1))
    for expert in range(4):
        own = (chosen == expert).any(1)
        x = entering[own]
        got = met[f"mlp.experts.{expert}.gate_proj"]
        if at_once is not None and least:
            continue  # in each part so many as it is of the whole
        if len(x) >= least:
            torch.testing.assert_close(got, x.T @ x / len(x))
        else:
            others = entering[~own]
            count = min(least - len(x), len(others))
            more = others[[i * len(others) // count for i in range(count)]]
            x = torch.cat((x, more))
            torch.testing.assert_close(got, x.T @ x / len(x))
    if least:
        assert any(int((chosen == expert).sum()) < least for expert in range(4))


@torch.no_grad()
def test_what_an_expert_is_shown_beside_its_own_changes_nothing(make_moe):
    _, block, hidden, arguments = block_of(make_moe("qwen3_moe"))
    want = block(hidden, **arguments)
    with experts.shown_at_least(block, 1.0):
        assert torch.equal(block(hidden, **arguments), want)
        assert block.mlp.experts.least == experts.LEAST_TOKENS
    assert block.mlp.experts.least == 0


def test_experts_that_see_too_little_are_named_in_the_card(make_moe, tmp_path, monkeypatch):
    """128 tokens, two experts each: 64 on average."""
    folder = make_moe("qwen3_moe")
    report = quantize_checkpoint(folder, tmp_path / "a", Recipe.of("gptq", group_size=16), **FAST)
    assert len(report.notes) == 2 and report.notes[1].startswith("model.layers.1: 4 of 4 experts")
    assert "fewer than 512 calibration tokens" in report.notes[0]
    monkeypatch.setattr(experts, "LEAST_TOKENS", 1)
    report = quantize_checkpoint(folder, tmp_path / "b", Recipe.of("gptq", group_size=16), **FAST)
    assert report.notes == []


def test_the_size_is_exact_up_to_the_header(make_moe, tmp_path):
    folder, out = make_moe("qwen2_moe"), tmp_path / "out"
    recipe = Recipe.of("gptq", group_size=16)
    plan, needs = dry_run(folder, out, recipe, **FAST)
    report = quantize_checkpoint(folder, out, recipe, **FAST)
    assert 0 <= report.bytes_after - needs.output < 20_000  # names of 26 linears in the header
    assert plan.group_sizes == report.plan.group_sizes and needs.seconds > 0


def test_interrupted_and_resumed_it_ends_in_the_same_bytes(make_moe, tmp_path, monkeypatch):
    folder, recipe = make_moe("qwen2_moe"), Recipe.of("awq", group_size=32)
    quantize_checkpoint(folder, tmp_path / "whole", recipe, **FAST)

    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.Report, "add", interrupt)
        quantize_checkpoint(folder, tmp_path / "out", recipe, **FAST)
    report = quantize_checkpoint(folder, tmp_path / "out", recipe, resume=True, **FAST)
    files = ("model.safetensors", "config.json")
    assert all(
        (tmp_path / "out" / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files
    )
    assert report.notes  # those of the part that was done before, too


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"group_size": 16, "target": "compressed-tensors"}),
        ("awq", {"group_size": 16, "target": "compressed-tensors", "symmetric": True}),
        ("fp8", {"fp8_scheme": "block"}),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_transformers_reads_what_the_card_says_it_reads(
    make_moe, tmp_path, family, method, options
):
    out, ids = tmp_path / "out", list(range(3, 40))
    report = quantize_checkpoint(make_moe(family), out, Recipe.of(method, **options), **FAST)
    assert "transformers: `pip install" in "".join(card._uses(report))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        got = model(torch.tensor([ids])).logits[0].float()
    want = logits(out, ids)
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("qwen3_moe", Recipe.of("awq", group_size=16), "has no names for"),
        ("qwen3_moe", Recipe.of("awq", None, 16, target="compressed-tensors"), "zero points"),
        ("granitemoe", Recipe.of("fp8"), "one by one"),
    ],
)
def test_the_card_says_what_transformers_does_not_read(make_moe, tmp_path, family, recipe, said):
    report = quantize_checkpoint(make_moe(family), tmp_path / "out", recipe, **FAST)
    uses = "".join(card._uses(report))
    assert "not transformers" in uses and said in uses and "pip install" not in uses


def test_experts_of_a_layer_have_the_same_bits(make_moe, tmp_path):
    recipe = Recipe.of("gptq", group_size=16, auto_bits=3.6)
    quantize_checkpoint(make_moe("qwen3_moe"), tmp_path / "out", recipe, **FAST)
    checkpoint = open_checkpoint(tmp_path / "out")
    bits = {
        m: checkpoint.linear(m).bits for m in checkpoint.modules() if checkpoint.is_quantized(m)
    }
    assert len(set(bits.values())) > 1
    for layer in range(2):
        for names in (("gate", "up"), ("down",)):
            pattern = rf"model\.layers\.{layer}\.mlp\.experts\.\d\.({'|'.join(names)})_proj"
            assert len({b for m, b in bits.items() if re.fullmatch(pattern, m)}) == 1
