"""Conversions of tiny models from end to end: what is on disk is what was computed, and nothing half-done stays."""

import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import nibble
from nibble.architectures.base import (
    Attention,
    Experts,
    LatentAttention,
    Mamba2,
    PlainMlp,
    ShortConv,
)
from nibble.architectures.multimodal import CLASSES
from nibble.architectures.registry import ARCHITECTURES
from nibble.errors import CheckpointError, UnsupportedError, UserError
from nibble.quant.card import Quality, write_card
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.conversion import calibration
from nibble.quant.conversion.blocks import BlockSource
from nibble.quant.conversion.folding import fold_block
from nibble.quant.conversion.pipeline import dry_run, quantize_checkpoint
from nibble.quant.conversion.plan import make_plan
from nibble.quant.conversion.recipe import Recipe
from nibble.quant.weight import QuantizedWeight

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}


@pytest.fixture
def gguf_file(make_gguf):
    return make_gguf("llama")


def logits(folder, ids):
    """By transformers, from the weights that a checkpoint stands for."""
    plain = folder.with_name(folder.name + "-plain")
    dequantize_checkpoint(open_checkpoint(folder), plain, torch.float32)
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(
        torch.tensor([ids])
    ).logits[0]


@pytest.mark.parametrize(("method", "options"), [
    ("awq", {}), ("awq", {"symmetric": True}), ("gptq", {}), ("gptq", {"symmetric": False, "group_size": 32}),
    ("gptq", {"bits": 3, "group_size": 32}), ("gptq", {"bits": 8, "group_size": -1}), ("fp8", {})])  # fmt: skip
@torch.no_grad()
def test_converted_model_computes_nearly_what_the_original_does(dense, tmp_path, method, options):
    out = convert(dense, tmp_path / "out", method, **FAST, **options)
    checkpoint = open_checkpoint(out)
    quantized = [m for m in checkpoint.modules() if checkpoint.is_quantized(m)]
    assert len(quantized) == 14
    ids = list(range(3, 35))
    p, q = (torch.log_softmax(logits(folder, ids), -1) for folder in (dense, out))
    assert (p.exp() * (p - q)).sum(-1).mean() < (
        1e-3 if method == "fp8" or options.get("bits") == 8 else 0.02
    )
    assert not (tmp_path / "out.partial").exists()
    assert (out / "tokenizer.json").exists() and (out / "config.json").exists()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_gguf_in_quantized_out(make_gguf, tmp_path, arch):
    out = convert(make_gguf(arch), tmp_path / "out", "awq", **FAST)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == 32


def test_same_seed_same_bytes_and_every_weight_is_there(dense, tmp_path):
    first, second = (convert(dense, tmp_path / name, "gptq", **FAST) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    checkpoint, original = open_checkpoint(first), open_checkpoint(dense)
    assert checkpoint.modules() == original.modules()
    for name in original.names():
        if name == "model.norm.weight" or "embed" in name:
            assert torch.equal(checkpoint.tensor(name), original.tensor(name))


def test_one_group_size_for_all_layers_or_exceptions(dense, tmp_path):
    """Widths 64 and 96: 64 does not divide 96, 32 does."""

    def group_sizes(folder):
        checkpoint = open_checkpoint(folder)
        mlp = (checkpoint.linear(f"model.layers.1.mlp.{n}_proj") for n in ("gate", "down"))
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        return [weight.group_size for weight in mlp], config

    awq, awq_config = group_sizes(convert(dense, tmp_path / "a", "awq", group_size=64, **FAST))
    assert (awq, awq_config["group_size"]) == ([32, 32], 32)
    gptq, gptq_config = group_sizes(convert(dense, tmp_path / "g", "gptq", group_size=64, **FAST))
    assert (gptq, gptq_config["group_size"]) == ([32, 32], 32)
    assert "dynamic" not in gptq_config  # which transformers does not apply
    mixed, _ = group_sizes(
        convert(dense, tmp_path / "c", "gptq", group_size=64, to="compressed-tensors", **FAST)
    )
    assert mixed == [64, 32]


def test_gptq_takes_exceptions_rather_than_tiny_groups(make_checkpoint, tmp_path):
    """Width 80 needs groups of 16; that all layers pay for it would cost more than the exceptions do."""
    folder = make_checkpoint(intermediate_size=80)
    out = convert(folder, tmp_path / "out", "gptq", group_size=64, **FAST)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64
    assert {rule["group_size"] for rule in config["dynamic"].values()} == {16}
    card = (out / "README.md").read_text()
    assert "GPTQModel.load" in card and "not transformers" in card


def test_width_that_no_group_divides_stays_dense(make_checkpoint, tmp_path):
    folder = make_checkpoint(intermediate_size=88)
    for method in ("awq", "gptq"):
        report = quantize_checkpoint(folder, tmp_path / method, Recipe.of(method, None, 64), **FAST)
        checkpoint = open_checkpoint(tmp_path / method)
        down = "model.layers.0.mlp.down_proj"
        assert "no group of 64" in report.plan.dense[down]
        assert any("stay dense" in note for note in report.plan.notes)
        assert checkpoint.scheme.layer(down) is None and not checkpoint.is_quantized(down)
        assert isinstance(checkpoint.linear("model.layers.0.mlp.up_proj"), QuantizedWeight)


MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 32}  # fmt: skip
DELTA_NET = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
             "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
             "rope_parameters": None}  # fmt: skip
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "rope_parameters": None,
}
DEEPSEEK = (
    MOE
    | LATENT
    | {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
)
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "rope_parameters": None,
         "layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 64}  # fmt: skip
VARIANTS = {
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy", "q_lora_rank": None}, "deepseek_v3": DEEPSEEK,
    "glm4_moe": MOE | {"n_shared_experts": 1, "use_qk_norm": True, "rope_parameters": None},
    "glm4_moe_lite": DEEPSEEK, "mistral4": DEEPSEEK | {"qk_nope_head_dim": 16, "head_dim": 32},
    "youtu": LATENT, "minicpm3": LATENT | {"scale_emb": 2.0},
    "llama": {}, "mistral": {"sliding_window": 16, "head_dim": 16}, "qwen2": {},
    "seed_oss": {"head_dim": 32, "attention_bias": True},
    "ministral": {"sliding_window": 16, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.1}},
    "smollm3": {}, "phi3": {}, "olmo2": {}, "olmo3": {"sliding_window": 16},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.5},
    "granitemoehybrid": MOE | MAMBA | {"residual_multiplier": 0.5, "attention_multiplier": 0.4},
    "granitemoeshared": MOE | {"residual_multiplier": 0.5, "shared_intermediate_size": 64},
    "granitemoe_swa": MOE | {"sliding_window": 16, "shared_intermediate_size": 64},
    "bamba": {k: v for k, v in MAMBA.items() if k != "layer_types"} | {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "pad_token_id": 0},
    "granite_swa": {"sliding_window": 16, "attention_multiplier": 0.4, "layer_rope_theta": [0, 500.0]},
    "nemotron_h": MOE | {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "mlp"], "head_dim": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "time_step_min": 1e-12,
        "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 32},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32}, "qwen3_moe": MOE, "olmoe": MOE,
    "gpt_oss": MOE | {"head_dim": 16, "sliding_window": 16},
    "mixtral": MOE, "granitemoe": MOE | {"residual_multiplier": 0.5},
    "dots1": MOE | {"n_shared_experts": 2, "n_group": 2, "norm_topk_prob": True},
    "qwen3_5_text": DELTA_NET, "qwen3_5_moe_text": MOE | DELTA_NET | {"shared_expert_intermediate_size": 32},
    "qwen3_next": MOE | DELTA_NET | {"shared_expert_intermediate_size": 32},
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "rope_parameters": None},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "rope_parameters": None},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention"], "num_hidden_layers": 3, "head_dim": 16,
             "sliding_window": 16, "rope_parameters": None},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
               "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32,
                    "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": None},
    "gemma3n_text": {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 4, "laurel_rank": 16,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": None,
                     "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 300,
                     "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0]},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64, "sliding_window": 16, "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": None,
                    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 400},
    "gemma4_unified_text": {"head_dim": 32, "global_head_dim": 64, "sliding_window": 16, "attention_k_eq_v": True,
                            "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": None},
}  # fmt: skip


@pytest.mark.parametrize(  # parts of what also sees: tests/engine/test_multimodal.py
    "model_type",
    sorted(entry.model_type for entry in ARCHITECTURES if entry.name not in CLASSES),
)
@torch.no_grad()
def test_blocks_run_as_transformers_runs_the_model_and_folds_change_nothing(
    make_checkpoint, model_type
):
    checkpoint = open_checkpoint(make_checkpoint(model_type=model_type, **VARIANTS[model_type]))
    source = BlockSource(checkpoint, torch.device("cpu"))
    ids = torch.arange(3, 51).reshape(2, 24)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    want = model.base_model(ids, output_hidden_states=True).hidden_states
    if model_type == "mamba2":  # it does not count what enters the first block
        want = (model.get_input_embeddings()(ids), *want)
    if source.spec.alt_up is not None:  # streams, which activations have side by side
        want = tuple(each.permute(1, 2, 0, 3).flatten(2) for each in want)
    hidden = source.embed(ids)
    arguments = source.keyword_arguments(hidden[:1])
    # Gemma rounds its embedding scale by dtype
    torch.testing.assert_close(source.carried.hidden(hidden), want[0], rtol=1e-2, atol=1e-2)
    source.carried.hidden(hidden).copy_(want[0])
    for index in range(len(source)):
        block = source.load(index)
        out = run(block, hidden, arguments[index])
        if index + 1 < len(source):  # the last hidden state of transformers is after the final norm
            found = source.carried.hidden(out)
            torch.testing.assert_close(found, want[index + 1], rtol=1e-4, atol=1e-4)
        _check_folds(source, index, block, hidden, arguments[index], out)
        hidden = out
    if source.spec.alt_up is not None:
        found = source.last_hidden(hidden)
        scale = torch.rsqrt(found.square().mean(-1, keepdim=True) + source.spec.norm_eps)
        got = found * scale * model.base_model.norm.weight
        torch.testing.assert_close(got, model.base_model(ids)[0], rtol=1e-4, atol=1e-4)


def _check_folds(source, index, block, hidden, kwargs, want):
    """Folding leaves the block's function alone, and makes every rounded linear no worse."""
    folds, layer = source.folds(index), source.spec.layers[index]
    stages = [member for group in source.spec.groups(index) for member in group.members()]
    groups = [group.modules for group in stages if not group.dense]
    inputs = calibration.input_statistics(block, hidden, kwargs, [fold.reads for fold in folds])
    grids = {name: (4, 32, False) for group in groups for name in group}
    before = {name: p.clone() for name, p in block.named_parameters()}
    gains = fold_block(
        block, folds, inputs, grids, torch.bfloat16, 1.0 if source.spec.norm_offset else 0.0
    )
    mlp, kinds = layer.mlp, Counter(fold.kind for fold in folds)
    many = isinstance(mlp, Experts)
    rows = mlp.num_experts + (mlp.shared is not None) if many else int(mlp is not None)
    rows = 0 if many and mlp.clamp is not None else rows
    plain = isinstance(mlp, PlainMlp) or (many and mlp.plain)
    roots, rows = (rows, 0) if plain else (0, rows)
    rows += isinstance(layer.mixer, ShortConv | LatentAttention)
    before_either = (layer.norms.before_mixer, layer.norms.before_mlp)
    norms = sum(norm is not None for norm in before_either) + isinstance(layer.mixer, Mamba2)
    norms -= layer.laurel is not None
    if isinstance(layer.mixer, LatentAttention):
        norms += 1 + (layer.mixer.q_rank is not None)
    assert kinds["norm"] == norms
    assert (kinds["rows"], kinds["roots"]) == (rows, roots)
    has_values = isinstance(layer.mixer, Attention) and not layer.mixer.v_norm
    assert kinds["heads"] == has_values and len(gains) == len(folds)
    assert all(gain <= 1 for gain in gains.values()) and min(gains.values()) < 1
    assert any(not torch.equal(p, before[name]) for name, p in block.named_parameters())
    torch.testing.assert_close(run(block, hidden, kwargs), want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def run(block, hidden, kwargs):
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def test_each_linear_is_quantized_on_what_the_quantized_ones_before_it_produce(dense):
    source = BlockSource(open_checkpoint(dense), torch.device("cpu"))
    hidden = source.embed(torch.arange(3, 67).reshape(4, 16))
    kwargs = source.keyword_arguments(hidden[:1])[0]
    block = source.load(0)
    sites = [group[0] for group in source.groups(0)]
    met = {}

    def damage(site, hessian):
        """Stands in for quantization: any change of the weights that the sites after it must see."""
        met[site] = hessian
        block.get_submodule(site).weight.mul_(0.7)

    out = hidden.clone()
    calibration.run_quantizing(block, out, kwargs, [[site] for site in sites], damage)
    assert list(met) == sites
    torch.testing.assert_close(out, run(block, hidden, kwargs))
    seen = {}
    for site in sites:
        block.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: seen.__setitem__(site, args[0].flatten(0, 1))
        )
    run(block, hidden, kwargs)
    for site, x in seen.items():
        torch.testing.assert_close(met[site], x.T @ x / len(x))


def test_input_statistics_are_those_of_all_tokens_however_they_are_batched(dense, monkeypatch):
    source = BlockSource(open_checkpoint(dense), torch.device("cpu"))
    hidden = source.embed(torch.arange(3, 67).reshape(4, 16))
    kwargs = source.keyword_arguments(hidden[:1])[0]
    block = source.load(0)
    whole = calibration.input_statistics(
        block, hidden, kwargs, ["self_attn.q_proj", "mlp.down_proj"]
    )
    x = block.input_layernorm(hidden).flatten(0, 1)
    torch.testing.assert_close(whole["self_attn.q_proj"].mean_abs, x.abs().mean(0))
    torch.testing.assert_close(whole["self_attn.q_proj"].products, x.T @ x / len(x))
    monkeypatch.setattr(calibration, "MICRO_BATCH", 3)
    parts = calibration.input_statistics(
        block, hidden, kwargs, ["self_attn.q_proj", "mlp.down_proj"]
    )
    for site, value in whole.items():
        torch.testing.assert_close(parts[site].mean_abs, value.mean_abs)
        torch.testing.assert_close(parts[site].products, value.products)


def test_output_in_use_is_refused_unless_told_to_overwrite(dense, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(dense, out, "fp8")
    assert (out / "precious").exists()
    convert(dense, out, "fp8", overwrite=True)
    assert not (out / "precious").exists() and (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="the model itself"):
        convert(dense, dense, "fp8", overwrite=True)


@pytest.mark.parametrize(
    ("method", "bits", "group_size"),
    [("awq", 3, 128), ("gptq", 5, 128), ("fp8", 4, 128), ("gptq", 4, 20), ("nf4", None, 128)],
)
def test_impossible_recipes_are_refused(method, bits, group_size):
    with pytest.raises(UnsupportedError):
        Recipe.of(method, bits, group_size)


def test_what_nothing_could_serve_is_not_converted(dense, tmp_path):
    """One table for serving and converting, asked before anything is read, by a dry run too."""
    for change, said in (
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"hidden_act": "relu2"}, "relu2"),
    ):
        folder = shutil.copytree(dense, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((dense / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedError, match=said):
            dry_run(folder, tmp_path / "out", Recipe.of("awq"))
        with pytest.raises(UnsupportedError, match=said):
            convert(folder, tmp_path / "out", "awq")
        assert not list(tmp_path.glob("out*"))


def test_plan_for_widths_of_smollm2(make_checkpoint):
    source_folder = make_checkpoint(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        num_hidden_layers=1,
    )
    checkpoint = open_checkpoint(source_folder)
    source = BlockSource(checkpoint, torch.device("cpu"))
    assert set(make_plan(checkpoint, source, Recipe.of("awq")).group_sizes.values()) == {64}
    gptq = make_plan(checkpoint, source, Recipe.of("gptq"))
    assert set(gptq.group_sizes.values()) == {64} and "64 instead of 128 in 7 of 7" in gptq.notes[0]
    assert gptq.scheme.default.group_size == 64 and not gptq.scheme.overrides
    for recipe in (Recipe.of("gptq", target="compressed-tensors"), Recipe.of("gptq", auto_bits=3)):
        mixed = make_plan(checkpoint, source, recipe)
        assert mixed.group_sizes["model.layers.0.mlp.down_proj"] == 128
        assert mixed.group_sizes["model.layers.0.mlp.gate_proj"] == 64
        assert mixed.scheme.default.group_size == 128
        assert mixed.scheme.layer("model.layers.0.mlp.gate_proj").group_size == 64


class Bytes:
    """A tokenizer of one token a byte, with or without a token at the start."""

    def __init__(self, bos):
        self.bos = bos

    def encode(self, text, add_special_tokens=True):
        return self.bos * add_special_tokens + [10 + b for b in text.encode()]


@pytest.mark.parametrize("bos", [[], [1]])
def test_samples_are_repeatable_and_start_as_the_tokenizer_does(bos):
    one, two, other = (calibration.bundled_samples(Bytes(bos), 20, 64, seed) for seed in (0, 0, 1))
    assert one.token_ids.shape == (20, 64)
    assert torch.equal(one.token_ids, two.token_ids) and not torch.equal(
        one.token_ids, other.token_ids
    )
    assert one.sha256 == other.sha256 and len(one.sha256) == 64
    assert ((one.token_ids == 1).sum(1) == len(bos)).all() and (
        not bos or (one.token_ids[:, 0] == 1).all()
    )


def test_evaluation_text_shares_nothing_with_calibration_text():
    for kind in calibration.EVALUATION:
        calibrated = (calibration.DATA / f"calib_{kind}.txt").read_text(encoding="utf-8")
        held_out = (calibration.DATA / f"eval_{kind}.txt").read_text(encoding="utf-8")
        long_lines = [line for line in held_out.splitlines() if len(line) > 60]
        assert len(long_lines) > 50
        assert not [line for line in long_lines if line in calibrated]
    assert sum(file.stat().st_size for file in calibration.DATA.iterdir()) < 600_000


def test_calibration_file_replaces_the_mix(dense, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("hello world " * 200)
    report = quantize_checkpoint(dense, tmp_path / "out", Recipe.of("gptq"), calib=text, **FAST)
    assert report.samples.source == "mine.txt"
    with pytest.raises(UserError, match="cannot be read"):
        convert(dense, tmp_path / "out2", "gptq", calib=tmp_path / "none.txt", **FAST)
    text.write_text("hi")
    with pytest.raises(UserError, match="fewer than one window"):
        convert(dense, tmp_path / "out2", "gptq", calib=text, **FAST)
    assert not (tmp_path / "out2").exists()


def test_card_says_what_was_done(dense, tmp_path):
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    out = tmp_path / "out"
    report = quantize_checkpoint(dense, out, Recipe.of("gptq", None, 64), **FAST)
    write_card(
        out,
        report,
        [Quality("prose", 100, 12.5, 12.0, 0.0421, 0.03, 0.3, 0.91)],
        "org/tiny",
        2_500_000_000,
    )
    record = json.loads((out / "nibble_quality.json").read_text())
    assert record["evaluation"][0]["kl_mean"] == 0.0421
    assert record["calibration"]["sha256"] == report.samples.sha256
    assert 4 < record["bits_per_weight"] < 5
    assert len(record["layer_error"]) == 14 and all(
        0 < e < 0.1 for e in record["layer_error"].values()
    )
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: org/tiny" in front and "base_model_relation: quantized" in front
    assert "license: apache-2.0" in front
    assert "0.0421" in card and "91.0%" in card and "group size 32 instead of 64" in card
    worst = max(
        (n for n in record["layer_error"] if n.endswith("down_proj")), key=record["layer_error"].get
    )
    assert f"{record['layer_error'][worst]:.3%} | {worst} |" in card
    assert "vllm serve" in card and "pip install transformers optimum gptqmodel" in card
    errors = [e for name, e in record["layer_error"].items() if name.endswith("down_proj")]
    assert f"| down_proj | {sum(errors) / len(errors):.3%} | {max(errors):.3%} |" in card
    assert "peak memory 2.5 GB" in card
    assert record["recipe"]["method"] == "gptq" and set(record["versions"]) >= {
        "python",
        "torch",
        "nibble-serve",
    }


def test_card_claims_no_original_that_the_hub_does_not_know(dense, tmp_path):
    out = convert(dense, tmp_path / "out", "fp8")
    card = (out / "README.md").read_text()
    assert "base_model" not in card and "# dense, " in card
    assert "pip install transformers compressed-tensors" in card and "Not measured" in card


@pytest.mark.parametrize("source", ["awq", "gguf"])
def test_what_was_quantized_before_is_said(dense, make_gguf, tmp_path, source):
    """To the user before work starts, and in the card, whose figures begin at the quantized source."""
    again = tmp_path / "again"
    model = (
        convert(dense, tmp_path / "awq", "awq", **FAST) if source == "awq" else make_gguf("llama")
    )
    told = []
    report = quantize_checkpoint(model, again, Recipe.of("fp8"), announce=told.append)
    scheme = open_checkpoint(model).scheme.describe()
    assert f"already quantized ({scheme})" in told[0].warnings[0]
    write_card(again, report, [], "org/tiny", 10**9)
    assert (
        f"already quantized ({scheme})" in (again / "README.md").read_text().split("## Recipe")[0]
    )
    assert json.loads((again / "nibble_quality.json").read_text())["source_scheme"] == scheme
    report = quantize_checkpoint(dense, tmp_path / "once", Recipe.of("fp8"), announce=told.append)
    assert report.source_scheme is None and not told[1].warnings


def test_card_names_only_runtimes_that_read_it(dense, tmp_path):
    for options in ({"bits": 3}, {"symmetric": False}):
        out = tmp_path / f"out{options}"
        report = quantize_checkpoint(
            dense, out, Recipe.of("gptq", group_size=32, **options), **FAST
        )
        write_card(out, report, [], "org/tiny", 10**9)
        assert (
            "not vLLM, which reads symmetric GPTQ of 4 and 8 bits alone"
            in (out / "README.md").read_text()
        )
