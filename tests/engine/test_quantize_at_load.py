"""`nibble serve --quantize`: a 16-bit checkpoint quantized while it loads, and kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble import LLM
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.errors import CheckpointError, UnsupportedError
from nibble.quant.at_load import quantized_at_load
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.weight import QuantizedWeight

from . import models

IDS = list(range(60, 100))


def logits(folder, **options):
    return torch.log_softmax(
        LLM(str(folder), dtype="float32", kv_cache_memory=1 << 22, **options).logits(IDS), -1
    )


@pytest.mark.parametrize(("kind", "most"), [("int4", 0.2), ("int8", 1e-3), ("fp8", 0.02)])
def test_quantized_at_load_is_close_and_what_was_kept_is_the_same(tiny_llama, tmp_path, kind, most):
    plain = logits(tiny_llama)
    out = tmp_path / "kept"
    quantized = logits(tiny_llama, quantize=kind, save_quantized=str(out))
    divergence = (plain.exp() * (plain - quantized)).sum(-1).mean()
    assert 0 < divergence < most
    assert not list(tmp_path.glob("*.partial")) and not (out / ".work").exists()
    torch.testing.assert_close(logits(out), quantized)
    checkpoint, source = open_checkpoint(out), open_checkpoint(tiny_llama)
    assert checkpoint.modules() == source.modules()
    assert isinstance(checkpoint.linear("model.layers.1.mlp.down_proj"), QuantizedWeight)
    names = load_file(out / "model.safetensors")
    assert torch.equal(
        names["model.embed_tokens.weight"], source.tensor("model.embed_tokens.weight")
    )
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )
    assert (out / "tokenizer.json").exists()


def test_a_quantized_weight_is_the_nearest_on_its_own_grid(tiny_llama):
    """Every code is the nearest to the weight that its scale and zero point allow."""
    with quantized_at_load(open_checkpoint(tiny_llama), "int4") as checkpoint:
        weight = checkpoint.linear("model.layers.0.self_attn.q_proj")
    dense = open_checkpoint(tiny_llama).dense("model.layers.0.self_attn.q_proj", torch.float32)
    scales = weight.scales.float().repeat_interleave(weight.group_size, 1)
    zeros = weight.zeros.float().repeat_interleave(weight.group_size, 1)
    candidates = (torch.arange(16).reshape(-1, 1, 1) - zeros) * scales
    nearest = (candidates - dense).abs().amin(0)
    torch.testing.assert_close((weight.dequantize() - dense).abs(), nearest)


@pytest.mark.parametrize("family", ["qwen2-moe", "granitemoe"])
def test_experts_are_quantized_at_load_and_what_chooses_them_is_not(tmp_path, family):
    """One by one, also where they lie in one tensor a layer; what is kept is served alike."""

    def logprobs(folder, **options):
        config = EngineConfig(
            model=str(folder), dtype="float32", kv_cache_memory=1 << 22, **options
        )
        return torch.log_softmax(Runner(config).logits(IDS), -1)

    source, out = tmp_path / "source", tmp_path / "kept"
    models.build(family, source)
    plain = logprobs(source)
    quantized = logprobs(source, quantize="int8", save_quantized=str(out))
    divergence = (plain.exp() * (plain - quantized)).sum(-1).median()
    assert 0 < divergence < 1e-2
    torch.testing.assert_close(logprobs(out), quantized)
    kept, original = open_checkpoint(out), open_checkpoint(source)
    assert kept.modules() == original.modules()
    experts = [m for m in kept.modules() if ".experts." in m]
    assert experts and all(kept.is_quantized(m) for m in experts)
    for name in ("block_sparse_moe.router.layer", "mlp.gate", "mlp.shared_expert_gate"):
        module = f"model.layers.2.{name}"
        if module in kept.modules():
            assert kept.scheme.layer(module) is None and not kept.is_quantized(module)
            assert torch.equal(kept.dense(module), original.dense(module))


def test_what_cannot_be_quantized_at_load_is_refused(tiny_llama, tmp_path):
    with pytest.raises(UnsupportedError, match="int3"):
        LLM(str(tiny_llama), quantize="int3")
    with pytest.raises(UnsupportedError, match="needs --quantize"):
        LLM(str(tiny_llama), save_quantized=str(tmp_path / "x"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        LLM(str(tiny_llama), quantize="int8", save_quantized=str(tmp_path / "full"))
    logits(tiny_llama, quantize="int8", save_quantized=str(tmp_path / "kept"))
    with pytest.raises(UnsupportedError, match="quantized already"):
        LLM(str(tmp_path / "kept"), quantize="int4")


def write_blocks(folder, widths):
    """A checkpoint with one matrix a block, of these widths: groups of 16 or more divide 64, but not 72."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"model.norm.weight": torch.ones(8)}
    for index, width in enumerate(widths):
        tensors[f"model.layers.{index}.mlp.down_proj.weight"] = torch.randn(32, width).half()
        tensors[f"model.layers.{index}.input_layernorm.weight"] = torch.ones(width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def test_a_block_that_stays_dense_is_kept_too(tmp_path):
    source = write_blocks(tmp_path / "source", [64, 72, 64, 72])
    with quantized_at_load(source, "int4", str(tmp_path / "kept")) as reading:
        for index in range(4):
            reading.linear(f"model.layers.{index}.mlp.down_proj")
    kept = open_checkpoint(tmp_path / "kept")
    assert kept.modules() == source.modules()
    for index, quantized in enumerate([True, False, True, False]):
        name = f"model.layers.{index}.mlp.down_proj"
        assert isinstance(kept.linear(name), QuantizedWeight) == quantized
    dense = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(kept.tensor(dense), source.tensor(dense))


def test_where_nothing_could_be_quantized_nothing_is_kept(tmp_path):
    source = write_blocks(tmp_path / "source", [72])
    reading = quantized_at_load(source, "int4", str(tmp_path / "kept"))
    with pytest.raises(UnsupportedError, match="no layer could be quantized to int4"), reading as r:
        r.linear("model.layers.0.mlp.down_proj")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
