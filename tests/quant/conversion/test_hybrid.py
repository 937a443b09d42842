"""Models with recurrent layers: what is quantized, what stays as it is, and that the result is what it stands for."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nibble
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

convert = partial(nibble.convert, evaluate=False, calib_samples=4, calib_seqlen=48)
IDS = list(range(3, 43))
FIELDS = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "rope_parameters": None,
}
QUANTIZED = ("in_proj_qkv", "in_proj_z", "out_proj", *(f"{name}_proj" for name in "qkvo"))
QUANTIZED += ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def hybrid(make_checkpoint):
    """A tiny Qwen 3.5, with a float32 A_log and a layer that drafts."""
    folder = make_checkpoint("hybrid", "qwen3_5_text", **FIELDS)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: t.float() * 1.001 for n, t in tensors.items() if n.endswith("A_log")}
    drafting = torch.randn(64, 64, dtype=torch.bfloat16)
    tensors |= {
        "mtp.layers.0.self_attn.q_proj.weight": drafting,
        "mtp.norm.weight": drafting[0].clone(),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def served(folder):
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 23)
    return Runner(config).logits(IDS)


@torch.no_grad()
def transformers_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        torch.tensor([IDS])
    ).logits[0]


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_the_result_is_served_as_transformers_computes_its_weights(hybrid, tmp_path, method):
    out = convert(hybrid, tmp_path / "out", method, **{} if method == "fp8" else {"group_size": 32})
    original, checkpoint = open_checkpoint(hybrid), open_checkpoint(out)
    quantized = {m for m in checkpoint.modules() if checkpoint.is_quantized(m)}
    assert quantized == {m for m in original.modules() if m.rpartition(".")[2] in QUANTIZED} - {
        "mtp.layers.0.self_attn.q_proj"
    }
    kept = [n for n in original.names() if n.startswith("mtp.") or n.endswith(("A_log", "dt_bias"))]
    assert len(kept) == 2 + 6
    for name in kept:
        assert torch.equal(checkpoint.tensor(name), original.tensor(name))
    dequantize_checkpoint(checkpoint, tmp_path / "plain", torch.float32)
    want = transformers_logits(tmp_path / "plain")
    assert torch.allclose(served(out), want, atol=1e-4 * want.abs().max())
    p, q = (torch.log_softmax(x, -1) for x in (transformers_logits(hybrid), want))
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < (0.05 if method == "fp8" else 0.5)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    said = json.dumps(config)
    assert "in_proj_a" in said and "mtp" in said  # other readers must not look for codes


@pytest.mark.parametrize("options", [{"desc_act": True}, {"bits": 8, "group_size": -1}])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "lfm2"])
def test_with_experts_other_names_and_linears_stored_head_by_head(
    make_checkpoint, tmp_path, family, options
):
    """Rows of codes, scales and zeros are put in order; act-order's permutation stays."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"shared_expert_intermediate_size": 32}
    convolutions = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    fields = convolutions if family.startswith("lfm2") else FIELDS
    folder = make_checkpoint(family, family, **(fields | experts))
    out = convert(folder, tmp_path / "out", "gptq", **({"group_size": 32} | options))
    dequantize_checkpoint(open_checkpoint(out), tmp_path / "plain", torch.float32)
    want = transformers_logits(tmp_path / "plain")
    assert torch.allclose(served(out), want, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_quantized_at_load_leaves_the_gates_alone(hybrid, tmp_path, kind):
    config = {"dtype": "float32", "kv_cache_memory": 1 << 23, "quantize": kind}
    config |= {"save_quantized": str(tmp_path / "kept")}
    logits = Runner(EngineConfig(model=str(hybrid), **config)).logits(IDS)
    checkpoint = open_checkpoint(tmp_path / "kept")
    quantized = {m.rpartition(".")[2] for m in checkpoint.modules() if checkpoint.is_quantized(m)}
    assert quantized == set(QUANTIZED)
    torch.testing.assert_close(served(tmp_path / "kept"), logits)
