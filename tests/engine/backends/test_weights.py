"""Weights that are not those of the model that config.json describes: one line, before any is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.errors import CheckpointError


def start(folder: Path) -> Runner:
    return Runner(EngineConfig(model=str(folder), kv_cache_memory=1 << 22, prepared_cache=None))


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def change(folder: Path, **config) -> dict:
    found = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(found))
    return load_file(folder / "model.safetensors")


def test_an_untied_model_without_a_head_is_refused(copy: Path) -> None:
    tensors = change(copy)
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*does not tie it"):
        start(copy)
    change(copy, tie_word_embeddings=True)
    start(copy)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 128}, r"norm.weight.*has shape \(64,\), config.json implies \(128,\)"),
        ({"vocab_size": 100}, r"embed_tokens.weight.*has shape \(264, 64\)"),
        ({"intermediate_size": 64}, r"gate_proj.weight.*has shape \(128, 64\)"),
        ({"num_hidden_layers": 3}, r"layers.2.*is missing"),
    ],
)
def test_shapes_that_config_does_not_imply_are_named(copy: Path, config: dict, said: str) -> None:
    change(copy, **config)
    with pytest.raises(CheckpointError, match=said) as error:
        start(copy)
    assert "download" not in str(error.value)


def test_the_ledger_counts_the_bytes_of_the_weights(tiny_llama: Path) -> None:
    """Embedding and head 264 x 64, per layer q, o 64 x 64, k, v 32 x 64, three 128 x 64: in bfloat16; norms in 32 bits
    count for little."""
    matrices = 2 * 264 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    for options in ({}, {"cpu_isa": "none"}):
        config = EngineConfig(
            model=str(tiny_llama), dtype="bfloat16", kv_cache_memory=1 << 22, **options
        )
        weights = Runner(config).ready().ledger["weights"]
        assert 2 * matrices <= weights <= 2.05 * matrices
