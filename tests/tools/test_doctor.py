"""nibble doctor: the findings a user acts on."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from nibble.cli import main
from nibble.kernels.dequant_gemm import tiles
from nibble.tools import doctor

from ..engine import models


def findings(capsys, *arguments: str) -> tuple[int, dict[str, list[dict]]]:
    code = main(["doctor", *arguments, "--json"])
    found: dict[str, list[dict]] = {}
    for finding in json.loads(capsys.readouterr().out):
        found.setdefault(finding["subject"], []).append(finding)
    return code, found


def test_a_machine_is_described(capsys):
    code, found = findings(capsys)
    assert code == 0
    assert {"python", "cpu", "c++ kernels", "memory"} <= found.keys()
    assert "torch" in found["python"][0]["text"]


def test_a_checkpoint_gets_its_kernels_and_its_memory(capsys, tiny_llama):
    code, found = findings(capsys, str(tiny_llama), "--device", "cpu")
    assert code == 0
    assert found["kernel"] and found["backend"] and found["fits"][0]["state"] == "ok"


def test_missing_cpp_kernels_are_slow_and_say_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr("nibble.kernels.cpu.library.why_missing", lambda: "install a compiler")
    code, found = findings(capsys)
    assert code == 0
    assert (found["c++ kernels"][0]["state"], found["c++ kernels"][0]["fix"]) == (
        "slow",
        "install a compiler",
    )


@pytest.mark.parametrize("change", [{"architectures": ["NoSuchForCausalLM"]}, None])
def test_what_cannot_be_served_is_no(capsys, tiny_llama, tmp_path, change):
    folder = tmp_path / "model"
    if change is not None:
        folder.mkdir()
        for file in tiny_llama.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    code, found = findings(capsys, str(folder))
    assert code == 2
    assert found["model"][0]["state"] == "no"


def test_tiles_that_were_not_measured_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "MEASURED", tmp_path)
    tiles.table.cache_clear()
    assert "nibble tune" in doctor.tiles("A Card", 90).fix
    tile = tiles.Tile(rows=64, block_m=16, block_n=64, warps=4, stages=3)
    measured = tiles.Table(90, 0, 64, 4, 64, (tile,), origin="nibble tune, today")
    (tmp_path / "A_Card.json").write_text(tiles.as_json([measured]))
    tiles.table.cache_clear()
    finding = doctor.tiles("A Card", 90)
    tiles.table.cache_clear()
    assert finding.text.endswith("nibble tune, today") and not finding.fix


def test_the_state_of_a_sequence_is_counted(capsys, tmp_path):
    config = AutoConfig.for_model(
        "qwen3_5_text",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=199,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    _, found = findings(capsys, str(tmp_path))
    # three layers, in float32: 3 inputs of 2 * 16 + 32 heads of 128, and 32 heads of 128 by 128
    size = 3 * 4 * (3 * 64 * 128 + 32 * 128 * 128)
    assert f"and {size / 2**20:.0f} MiB for the state" in found["fits"][0]["text"]
    assert "3 layers carry a state" in found["architecture"][0]["text"]


def test_a_model_whose_layers_share_a_table(capsys, tmp_path):
    """Gemma 4 E2B: one layer is loaded to see its kernels, which is not one layer's share of the table."""
    models.build("gemma4-shared", tmp_path)
    code, found = findings(capsys, str(tmp_path))
    assert code == 0 and "6 layers of 64" in found["architecture"][0]["text"]
    assert "model" not in found
