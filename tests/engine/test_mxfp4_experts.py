"""GPT-OSS with its experts in MXFP4, as OpenAI and transformers store them: read as they are, and multiplied so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.kernels.cpu import library
from nibble.quant.checkpoint import open_checkpoint

from . import models

IDS = torch.randint(3, 199, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """The folder, and transformers' model with the weights that its bytes stand for."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    models.build("gpt-oss", folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [name for name, t in tensors.items() if t.ndim == 3]:
        experts, width, out = tensors[name].shape  # which lie the other way round in MXFP4
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator)
        scales = torch.randint(121, 125, (experts, out, width // 32), generator=generator)
        blocks, scales = blocks.to(torch.uint8), scales.to(torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    dense = {k: t for k, t in tensors.items() if not k.endswith(("_blocks", "_scales"))}
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = {k: t for k, t in tensors.items() if f"{k}_blocks" not in tensors}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    dense_modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    named = {"quant_method": "mxfp4", "modules_to_not_convert": dense_modules}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": named}))
    return folder, reference


@torch.inference_mode()
def test_logits_are_those_of_the_dequantized_model(packed: tuple[Path, torch.nn.Module]) -> None:
    folder, reference = packed
    want = reference(torch.tensor([IDS])).logits[0]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_quantized("model.layers.0.mlp.experts.3.up_proj")
    assert not checkpoint.is_quantized("model.layers.0.self_attn.q_proj")
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 22)
    got = Runner(config).logits(IDS)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
@torch.inference_mode()
def test_the_cpp_kernels_multiply_by_the_codes(packed: tuple[Path, torch.nn.Module]) -> None:
    folder, reference = packed
    want = reference(torch.tensor([IDS])).logits[0]
    rounded = AutoModelForCausalLM.from_config(reference.config, dtype=torch.bfloat16).eval()
    rounded.load_state_dict({k: t.bfloat16() for k, t in reference.state_dict().items()})
    theirs = (rounded(torch.tensor([IDS])).logits[0].float() - want).norm()
    for activations, factor in (("bf16", 1.3), ("int8", 2)):
        config = EngineConfig(
            model=str(folder),
            dtype="bfloat16",
            kv_cache_memory=1 << 22,
            cpu_activations=activations,
            prepared_cache=None,
        )
        runner = Runner(config)
        used = runner.model.report.used
        assert sum(n for name, n in used.items() if "fp4" in name) == 4 * 8 * 3
        assert (runner.logits(IDS) - want).norm() <= factor * theirs
