"""The language model inside a model that sees: served and converted as transformers computes it, the rest untouched."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

import nibble
from nibble.architectures.multimodal import LAYOUTS, text_config
from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.errors import UnsupportedError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

from . import models
from .multimodal_models import NAMES, build, rename, text_logits

IDS = [9 + 37 * i % 180 for i in range(60)]  # more than Gemma 3's window


def served(folder: Path) -> torch.Tensor:
    config = EngineConfig(
        model=str(folder), dtype="float32", prepared_cache=None, kv_cache_memory=1 << 22
    )
    return Runner(config).logits(IDS)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    want = text_logits(build(name, tmp_path), IDS)
    assert (served(tmp_path) - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize(("prefix", "head"), LAYOUTS[:2])
def test_wherever_a_version_of_transformers_put_it(prefix: str, head: str, tmp_path: Path) -> None:
    want = text_logits(build("llava", tmp_path), IDS)
    rename(tmp_path, "language_model.model.", prefix)
    rename(tmp_path, "language_model.lm_head.", f"{head}.")
    assert (served(tmp_path) - want).abs().max() < 1e-4 * want.std()


def test_qwen2_vl_described_at_the_top_level(tmp_path: Path) -> None:
    """As its authors' config.json is, with a head that is tied or not as it says there."""
    model = build("qwen2_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {**text, **config, "rope_theta": 1e4, "rope_scaling": rope, "model_type": "qwen2_vl"}
    del flat["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    want = text_logits(model, IDS)
    assert (served(tmp_path) - want).abs().max() < 1e-4 * want.std()


def test_gemma_3n_beside_an_encoder_that_transformers_builds_with_timm_alone(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Its own class is built here of its parts: the language model, and tensors of encoders that nobody reads."""
    model = models.build("gemma3n", tmp_path)
    with torch.no_grad():
        want = model(torch.tensor([IDS])).logits[0]
    rename(tmp_path, "model.", "model.language_model.")
    tensors = load_file(tmp_path / "model.safetensors")
    others = {
        name: torch.randn(48, 32)
        for name in ("vision_tower.timm_model.conv_stem.conv", "embed_vision.embedding")
    }
    tensors |= {f"model.{name}.weight": tensor for name, tensor in others.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    config = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    config |= {"text_config": text, "vision_config": {}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (served(tmp_path) - want).abs().max() < 1e-4 * want.std()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path)
    out = nibble.convert(tmp_path, tmp_path / "out", "fp8", evaluate=False)
    stored = load_file(out / "model.safetensors")
    for name, tensor in others.items():
        assert torch.equal(stored[f"model.{name}.weight"], tensor)
    quantized = [name for name in stored if name.endswith(".weight_scale")]
    readers = 2  # layers without keys and values of their own
    assert len(quantized) == 7 * model.config.num_hidden_layers - 2 * readers
    assert all(".self_attn." in name or ".mlp." in name for name in quantized)


def test_what_the_language_model_inherits() -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "dtype": "bfloat16",
        "text_config": {"model_type": "gemma3_text", "dtype": "float32"},
    }
    text = text_config(config)
    assert (text["eos_token_id"], text["dtype"]) == ([1, 106], "float32")
    assert text_config({"model_type": "llama"}) == {"model_type": "llama"}
    with pytest.raises(UnsupportedError, match="ForConditionalGeneration of Gemma3"):
        nibble.architectures.registry.find({"architectures": ["PaliGemmaForConditionalGeneration"]})


@pytest.fixture
def converted(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> tuple[str, Path]:
    """(name of the original, in tmp_path/original; the conversion's folder)"""
    name, method = request.param
    build(name, tmp_path / "original").bfloat16().save_pretrained(tmp_path / "original")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, tmp_path / "original")
    options = {"calib_samples": 4, "calib_seqlen": 32, "evaluate": False}
    options |= {} if method == "fp8" else {"group_size": 32}
    return name, nibble.convert(tmp_path / "original", tmp_path / "out", method, **options)


EACH = pytest.mark.parametrize(
    "converted",
    [
        ("gemma3", "awq"),
        ("qwen2_vl", "gptq"),
        ("qwen3_vl", "fp8"),
        ("llava", "awq"),
        ("gemma4", "awq"),
        ("muse_glimmer", "awq"),
    ],
    indirect=True,
    ids=lambda pair: "-".join(pair),
)


@EACH
def test_a_conversion_is_the_whole_model(converted: tuple[str, Path], tmp_path: Path) -> None:
    """Everything else is as it was, bit for bit, and transformers loads all of it."""
    name, out = converted
    before, after = (open_checkpoint(folder) for folder in (tmp_path / "original", out))
    quantized = [module for module in after.modules() if after.is_quantized(module)]
    linears = 8 if name == "muse_glimmer" else 7
    assert len(quantized) == 4 * linears and not any("vis" in module for module in quantized)
    names = before.names() - {f"{module}.weight" for module in quantized}
    stored = load_file(out / "model.safetensors")
    for tensor in names:
        if "layers" not in tensor or "vis" in tensor:
            assert torch.equal(stored[tensor], before.tensor(tensor)), tensor
    dequantize_checkpoint(after, tmp_path / "plain", torch.float32)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = text_logits(model.eval(), IDS)
    assert (served(out) - want).abs().max() < 1e-4 * want.std()


@EACH
def test_its_config_says_what_is_not_quantized(converted: tuple[str, Path], tmp_path: Path) -> None:
    """By transformers' rule for lists of names; and vLLM's, which looks for each anywhere in a name of its own."""
    _, out = converted
    config = json.loads((out / "config.json").read_text())
    patterns = config["quantization_config"].get("modules_to_not_convert")
    if patterns is None:
        scheme = open_checkpoint(out).scheme
        assert scheme.layer("model.visual.blocks.0.attn.qkv") is None
        assert scheme.layer("visual.blocks.0.attn.qkv") is None
        assert scheme.layer("model.language_model.layers.0.mlp.up_proj") is not None
        return
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "original")
    for module, kind in model.named_modules():
        if isinstance(kind, torch.nn.Linear):
            inside = ".layers." in module and "language_model" in module and "_layer_" not in module
            assert should_convert_module(module, patterns) == inside, module
    assert any(pattern in "vision_tower.encoder.layers.0.mlp.fc1" for pattern in patterns)
