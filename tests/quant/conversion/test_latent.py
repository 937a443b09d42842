"""Models with latent attention: what is quantized, that the result is what it stands for, and layers that draft tokens,
which lie behind the others in the checkpoint."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nibble
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.errors import CheckpointError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

convert = partial(nibble.convert, evaluate=False, calib_samples=4, calib_seqlen=48)
IDS = list(range(3, 43))
FIELDS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": None,
}
QUANTIZED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.fixture
def latent(make_checkpoint):
    """A tiny DeepSeek V3 of two layers, and a third that drafts."""
    folder = make_checkpoint("latent", "deepseek_v3", **FIELDS)
    tensors = load_file(folder / "model.safetensors")
    drafting = {
        name.replace("layers.1.", "layers.2."): tensor + 1
        for name, tensor in tensors.items()
        if ".layers.1.self_attn." in name
    }
    drafting["model.layers.2.eh_proj.weight"] = torch.randn(64, 128, dtype=torch.bfloat16)
    save_file(tensors | drafting, folder / "model.safetensors", {"format": "pt"})
    return folder


def served(folder, **more):
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 23, **more)
    return Runner(config).logits(IDS)


@torch.no_grad()
def transformers_logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        torch.tensor([IDS])
    ).logits[0]


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_the_result_is_served_as_transformers_computes_its_weights(latent, tmp_path, method):
    out = convert(latent, tmp_path / "out", method, **{} if method == "fp8" else {"group_size": 32})
    original, checkpoint = open_checkpoint(latent), open_checkpoint(out)
    for layer, name in ((i, name) for i in range(3) for name in QUANTIZED):
        module = f"model.layers.{layer}.self_attn.{name}"
        assert checkpoint.is_quantized(module) == (layer < 2), module
    kept = [name for name in original.names() if ".layers.2." in name]
    assert len(kept) == 8
    for name in kept:
        assert torch.equal(checkpoint.tensor(name), original.tensor(name))
    dequantize_checkpoint(checkpoint, tmp_path / "plain", torch.float32)
    want = transformers_logits(tmp_path / "plain")
    assert torch.allclose(served(out), want, atol=1e-4 * want.abs().max())
    p, q = (torch.log_softmax(x, -1) for x in (transformers_logits(latent), want))
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < (0.05 if method == "fp8" else 0.5)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "layers.2" in json.dumps(config).replace(
        "\\", ""
    )  # other readers must not look for codes


def test_layers_that_draft_are_left_alone_where_weights_are_quantized_at_load(latent, tmp_path):
    Runner(
        EngineConfig(
            model=str(latent),
            dtype="float32",
            kv_cache_memory=1 << 23,
            quantize="int8",
            save_quantized=str(tmp_path / "out"),
        )
    )
    original, saved = open_checkpoint(latent), open_checkpoint(tmp_path / "out")
    assert saved.is_quantized("model.layers.1.self_attn.kv_b_proj")
    for name in (name for name in original.names() if ".layers.2." in name):
        assert torch.equal(saved.tensor(name), original.tensor(name))
    assert torch.isfinite(served(tmp_path / "out")).all()


def test_more_layers_than_the_file_says_are_still_refused(latent):
    """One that drafts may be there; two, or any where none drafts, are of another config.json."""
    file = latent / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match="is of layer 2, config.json says that there are 2"):
        served(latent)
