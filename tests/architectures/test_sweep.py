"""The sweep notices a model that is computed wrongly, and its page is of today's architectures."""

import json
import re
from pathlib import Path

import pytest

from nibble.architectures.multimodal import CLASSES
from nibble.architectures.registry import ARCHITECTURES
from nibble.kernels.cpu import library

from ..engine import models
from . import sweep

# whose encoder transformers builds with timm alone: tests/engine/test_multimodal.py has one of its parts
UNBUILT = {"Gemma3nForConditionalGeneration"}
REGISTERED = ({entry.name for entry in ARCHITECTURES} | CLASSES) - UNBUILT
needs_cpp = pytest.mark.skipif(library.why_missing() is not None, reason="no C++ kernels")


@needs_cpp
def test_a_model_that_is_right(capsys) -> None:
    assert sweep.main(["llama"]) == 0
    assert "1 of 1 keep every limit" in capsys.readouterr().out


@needs_cpp
def test_a_wrong_norm_epsilon_is_noticed(monkeypatch, capsys) -> None:
    """The reference has another than what is served."""
    right = models.build

    def wrong(name: str, folder: Path):
        model = right(name, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rms_norm_eps"] *= 100
        (folder / "config.json").write_text(json.dumps(config))
        return model

    monkeypatch.setattr(models, "build", wrong)
    monkeypatch.setattr(sweep, "METHODS", ())
    assert sweep.main(["llama"]) == 1
    said = capsys.readouterr().out
    for way in ("whole", "chunks", "decode", "ragged"):
        assert f"float32 {way}" in said.partition(";")[0]
    assert "0 of 1 keep every limit" in said


@needs_cpp
def test_a_model_that_fails_does_not_keep_the_others_from_being_measured(
    monkeypatch, capsys
) -> None:
    right = models.build

    def broken(name: str, folder: Path):
        if name == "qwen2":
            raise RuntimeError("no weights")
        return right(name, folder)

    monkeypatch.setattr(models, "build", broken)
    monkeypatch.setattr(sweep, "METHODS", ())
    assert sweep.main(["qwen2", "llama"]) == 1
    said = capsys.readouterr().out
    assert "FAILED RuntimeError: no weights" in said and "1 of 2 keep every limit" in said


def test_an_unknown_name_is_an_error(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["lama"])
    assert stopped.value.code == 2 and "no tiny model 'lama'" in capsys.readouterr().err


def test_a_row_is_replaced_and_the_others_stay() -> None:
    llama, _, third, *_ = sweep.entries()
    figures = [{"a": 1e-6, "b": 2e-6}, {"a": 0.25, "b": 0.5}, dict.fromkeys(sweep.METHODS, 1e-5)]
    result = sweep.Result(llama, {"cpp": None, "triton": "is slow"}, *figures)
    kept, gone = (f"| `C` | `m` | {name} | yes |" for name in (third.name, "gone"))
    page = f"{sweep.BEGIN}\n\n{gone}\n{kept}\n| `C` | `m` | llama | old |\n"
    *_, first, second = sweep.table([result], page, [llama.name, "unmeasured", third.name]).split(
        "\n"
    )
    cells = "yes | no: is slow | 2e-06 | 0.50 | 1e-05 | 1e-05 | 1e-05"
    assert first == f"| `LlamaForCausalLM` | `llama` | llama | {cells} |"
    assert second == kept


def test_every_registered_architecture_has_a_tiny_model() -> None:
    assert {entry.architecture for entry in sweep.entries()} == REGISTERED


def test_the_page_names_all_architectures_and_none_that_is_missing() -> None:
    before, _, table = sweep.PAGE.read_text().partition(sweep.BEGIN)
    measured = set(re.findall(r"^\| `(\w+)` ", table, re.MULTILINE))
    assert measured == REGISTERED
    assert {name for line in table.splitlines() for name in line.split(" | ")[2:3]} >= {
        entry.name for entry in sweep.entries()
    }
    refused = before.partition("## Not supported yet")[2].partition("Of classes that are")[0]
    missing = set(re.findall(r"`(\w+For\w+)`", refused))
    assert len(missing) > 5 and not missing & REGISTERED
