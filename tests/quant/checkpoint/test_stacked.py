"""Experts in one tensor a layer, read one by one: against plain indexing of what was saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.quant.checkpoint import open_checkpoint

from ...engine import models

LAYER = "model.layers.2.mlp.experts."


@pytest.fixture
def stacked(tmp_path: Path) -> tuple[Path, Path]:
    """A model with its experts one by one, as transformers saves it, and the same in stacks, as it holds them."""
    single, folder = tmp_path / "single", tmp_path / "stacked"
    model = models.build("qwen2-moe", single)
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text((single / "config.json").read_text())
    return single, folder


def test_a_stack_is_its_experts(stacked: tuple[Path, Path]) -> None:
    single, folder = map(open_checkpoint, stacked)
    whole = load_file(stacked[1] / "model.safetensors")
    assert f"{LAYER}gate_up_proj" in whole and f"{LAYER}gate_up_proj" not in folder.names()
    assert folder.names() == single.names() and folder.nbytes == single.nbytes
    assert folder.modules() == single.modules()
    for name in folder.names():
        assert folder.shape(name) == single.shape(name) == tuple(folder.tensor(name).shape)
        assert torch.equal(folder.tensor(name), single.tensor(name)), name
    assert torch.equal(folder.dense(f"{LAYER}5.up_proj"), whole[f"{LAYER}gate_up_proj"][5, 48:])


def test_what_is_served_is_the_same(stacked: tuple[Path, Path]) -> None:
    ids = [5, 17, 100, 3, 8]
    logits = [
        Runner(EngineConfig(model=str(folder), dtype="float32", kv_cache_memory=1 << 22)).logits(
            ids
        )
        for folder in stacked
    ]
    assert torch.allclose(
        *logits, atol=1e-5
    )  # memory that is aligned otherwise is summed otherwise


def test_an_unknown_model_is_left_as_it_is(stacked: tuple[Path, Path]) -> None:
    config = stacked[1] / "config.json"
    named = {"architectures": ["NewForCausalLM"], "model_type": "new"}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    assert f"{LAYER}gate_up_proj" in open_checkpoint(stacked[1]).names()


def test_a_stack_that_lies_the_other_way_round(stacked: tuple[Path, Path]) -> None:
    """As Qwen 3-VL's authors store it: [experts, hidden, 2 * inner] and [experts, inner, hidden]."""
    single, folder = stacked
    tensors = load_file(folder / "model.safetensors")
    turned = {
        name: t.transpose(1, 2).contiguous() if t.ndim == 3 else t for name, t in tensors.items()
    }
    save_file(turned, folder / "model.safetensors")
    plain, other = open_checkpoint(single), open_checkpoint(folder)
    assert other.names() == plain.names()
    for name in other.names():
        assert torch.equal(other.tensor(name), plain.tensor(name)), name
