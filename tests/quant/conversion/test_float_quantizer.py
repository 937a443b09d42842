"""FP8 conversions from end to end: what the scales cover, what is shared, what the file and its config say."""

import json
from functools import partial

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import nibble
from nibble.errors import UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.quant.conversion.recipe import Recipe

convert = partial(nibble.convert, evaluate=False)

FAST = {"calib_samples": 4, "calib_seqlen": 32}
BLOCK0 = "model.layers.0."


def close(a, b):
    """FP8's own error: three bits of mantissa."""
    return (a - b).abs().max() <= b.abs().max() / 16


@pytest.mark.parametrize("target", ["compressed-tensors", "fp8"])
def test_one_scale_for_what_runtimes_fuse(dense, tmp_path, target):
    out = open_checkpoint(
        convert(dense, tmp_path / "out", "fp8", fp8_scheme="tensor", to=target, **FAST)
    )
    original = open_checkpoint(dense)
    for stage in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        weights = [out.linear(BLOCK0 + name) for name in stage]
        widest = max(original.dense(BLOCK0 + name).abs().max() for name in stage)
        for name, weight in zip(stage, weights, strict=True):
            assert weight.scales.shape == (1, 1) and weight.scales.item() == pytest.approx(
                widest.item() / 448
            )
            assert (
                torch.equal(weight.input_scale, weights[0].input_scale)
                and weight.act_quant == "tensor"
            )
            assert close(weight.dequantize(), original.dense(BLOCK0 + name, torch.float32))


@pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated:FutureWarning"
)  # of transformers 5.24
def test_static_scales_are_the_widest_input_and_key_that_calibration_met(dense, tmp_path):
    """Against a transformers model of the quantized weights, run on the same tokens."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 3)
    options = {"calib_samples": 1, "calib_seqlen": 24, "calib": tmp_path / "text"}
    out = convert(dense, tmp_path / "out", "fp8", fp8_scheme="tensor", kv_scales=True, **options)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(out).encode(
        (tmp_path / "text").read_text(), add_special_tokens=False
    )
    from nibble.quant.conversion.calibration import bos_token, draw_windows

    window = draw_windows(
        torch.tensor(ids),
        1,
        24,
        bos_token(AutoTokenizer.from_pretrained(out)),
        torch.Generator().manual_seed(0),
    )
    dequantize_checkpoint(open_checkpoint(out), tmp_path / "plain", torch.float32)
    model, cache, met = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), DynamicCache(), {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _m, x, name=name: met.__setitem__(name, x[0].abs().max().item())
            )
    with torch.no_grad():
        model(window, past_key_values=cache)
    checkpoint = open_checkpoint(out)
    for name, widest in met.items():
        assert checkpoint.linear(name).input_scale.item() == pytest.approx(widest / 448, rel=1e-3)
    for i, layer in enumerate(cache.layers):
        for kind, states in (("k", layer.keys), ("v", layer.values)):
            scale = checkpoint.tensor(f"model.layers.{i}.self_attn.{kind}_scale")
            assert scale.shape == (1,) and scale.item() == pytest.approx(
                states.abs().max().item() / 448, rel=1e-3
            )
    assert checkpoint.scheme.kv_cache == "fp8"


@pytest.mark.parametrize("target", [None, "compressed-tensors"])
def test_blocks_of_128(make_checkpoint, tmp_path, target):
    folder = make_checkpoint(hidden_size=192, intermediate_size=320)
    checkpoint = open_checkpoint(
        convert(folder, tmp_path / "out", "fp8", fp8_scheme="block", to=target, **FAST)
    )
    original = open_checkpoint(folder).dense(BLOCK0 + "mlp.down_proj", torch.float32)
    weight = checkpoint.linear(BLOCK0 + "mlp.down_proj")
    assert weight.block == (128, 128) and weight.act_quant == "group"
    assert weight.scales[1, 2].item() == pytest.approx(
        original[128:, 256:].abs().max().item() / 448
    )
    assert close(weight.dequantize(), original)
    suffix = "weight_scale" if target else "weight_scale_inv"
    assert checkpoint.has(f"{BLOCK0}mlp.down_proj.{suffix}")


@pytest.mark.parametrize(
    "options", [{"fp8_scheme": "tensor", "kv_scales": True}, {"fp8_scheme": "block"}, {}]
)
def test_the_config_is_what_compressed_tensors_reads(dense, tmp_path, options):
    out = convert(dense, tmp_path / "out", "fp8", to="compressed-tensors", **options, **FAST)
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(raw)
    group = theirs.config_groups["group_0"]
    scheme = options.get("fp8_scheme", "channel")
    assert (
        group.weights.strategy == scheme
        and group.weights.type == "float"
        and group.weights.num_bits == 8
    )
    assert group.weights.block_structure == ([128, 128] if scheme == "block" else None)
    assert group.input_activations.dynamic is (scheme != "tensor")
    assert (
        group.input_activations.strategy
        == {"channel": "token", "tensor": "tensor", "block": "group"}[scheme]
    )
    assert (theirs.kv_cache_scheme is not None) == options.get("kv_scales", False)


@pytest.mark.parametrize(
    ("method", "options"), [("awq", {}), ("gptq", {"symmetric": False}), ("gptq", {"bits": 8})]
)
def test_integers_straight_to_compressed_tensors(dense, tmp_path, method, options):
    """Widths 64 and 96 with groups of 64: exceptions are named; scales of keys and values come with it."""
    out = convert(
        dense,
        tmp_path / "out",
        method,
        group_size=64,
        to="compressed-tensors",
        kv_scales=True,
        **options,
        **FAST,
    )
    checkpoint = open_checkpoint(out)
    assert checkpoint.linear(BLOCK0 + "mlp.gate_proj").group_size == 64
    assert checkpoint.linear(BLOCK0 + "mlp.down_proj").group_size == 32
    if (
        method == "gptq"
    ):  # where one group size suits all: the weights of the format that has been there for longer
        uniform = [
            open_checkpoint(
                convert(dense, tmp_path / to, method, group_size=32, to=to, **options, **FAST)
            )
            for to in ("compressed-tensors", "gptq_v2")
        ]
        for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"):
            assert torch.equal(*(other.dense(BLOCK0 + name) for other in uniform))
    assert checkpoint.tensor(BLOCK0 + "self_attn.k_scale").item() > 0
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(raw).config_groups
    assert {group.weights.group_size for group in groups.values()} == {32, 64}
    assert not (tmp_path / "out.partial").exists()


def test_gptq_v2_stores_the_zero_points_themselves(dense, tmp_path):
    for target in ("gptq", "gptq_v2"):
        convert(dense, tmp_path / target, "gptq", symmetric=False, group_size=32, to=target, **FAST)
    v1, v2 = (open_checkpoint(tmp_path / target) for target in ("gptq", "gptq_v2"))
    assert v2.scheme.format == "gptq_v2"
    stored = v2.tensor(BLOCK0 + "mlp.up_proj.qzeros")
    nibbles = torch.stack([(stored >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1).T
    assert torch.equal(v2.linear(BLOCK0 + "mlp.up_proj").zeros, nibbles.to(torch.uint8))
    assert not torch.equal(v1.tensor(BLOCK0 + "mlp.up_proj.qzeros"), stored)


def test_gptq_v1_gets_no_zero_point_that_it_cannot_hold(dense, tmp_path):
    """It stores zero - 1, so weights of one sign, whose zero would be 0, need another grid."""
    file = dense / "model.safetensors"
    weights = load_file(file)
    weights[BLOCK0 + "mlp.up_proj.weight"].abs_()
    save_file(weights, file, metadata={"format": "pt"})
    options = {"symmetric": False, "group_size": 32, "calib_samples": 2, "calib_seqlen": 32}
    for target, least in (("gptq", 1), ("gptq_v2", 0)):
        out = convert(dense, tmp_path / target, "gptq", to=target, **options)
        zeros = open_checkpoint(out).linear(BLOCK0 + "mlp.up_proj").zeros
        assert zeros.min() == least


def test_act_order_cuts_groups_by_importance(dense, tmp_path):
    """q, k, v share one order, as runtimes that fuse them want; transformers' logits say what that costs."""
    out = convert(dense, tmp_path / "out", "gptq", group_size=32, desc_act=True, **FAST)
    checkpoint = open_checkpoint(out)
    q, k, o = (checkpoint.linear(f"{BLOCK0}self_attn.{name}_proj") for name in "qko")
    assert q.perm is not None and torch.equal(q.perm, k.perm) and not torch.equal(q.perm, o.perm)
    g_idx = checkpoint.tensor(BLOCK0 + "self_attn.q_proj.g_idx")
    assert g_idx.bincount().tolist() == [32, 32] and not torch.equal(
        g_idx.long(), torch.arange(64) // 32
    )
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] is True
    ids, logits = torch.arange(3, 35).unsqueeze(0), {}
    for folder in (dense, out):
        dequantize_checkpoint(
            open_checkpoint(folder), tmp_path / f"{folder.name}-plain", torch.float32
        )
        with torch.no_grad():
            logits[folder] = AutoModelForCausalLM.from_pretrained(
                tmp_path / f"{folder.name}-plain"
            )(ids).logits[0]
    p, q = (torch.log_softmax(x, -1) for x in logits.values())
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02


@pytest.mark.parametrize(("method", "options", "message"), [
    ("awq", {"desc_act": True}, "--desc-act needs --gptq"),
    ("gptq", {"desc_act": True, "target": "compressed-tensors"}, "--desc-act needs --gptq"),
    ("awq", {"target": "gptq_v2"}, "--to gptq_v2 is not possible with --awq"),
    ("fp8", {"target": "fp8"}, "no scale per channel"),
    ("gptq", {"target": "compressed-tensors", "bits": 3}, "4 and 8 bits, not 3"),
    ("gptq", {"kv_scales": True}, "--kv-scales needs --to compressed-tensors"),
    ("fp8", {"kv_scales": True, "fp8_scheme": "block"}, "--kv-scales needs"),
    ("awq", {"fp8_scheme": "block"}, "--fp8-scheme block is not possible with --awq"),
    ("fp8", {"fp8_scheme": "row"}, "channel, tensor, block")])  # fmt: skip
def test_combinations_that_no_format_holds(method, options, message):
    with pytest.raises(UnsupportedError, match=message):
        Recipe.of(method, **options)
