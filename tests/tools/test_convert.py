"""`nibble convert` as a user runs it: conversion, evaluation through the engine, accuracy card, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300,
                          check=False)


@pytest.mark.parametrize("method", ["--awq", "--fp8"])
def test_a_conversion_carries_its_measured_quality(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    done = convert(str(tiny_llama), method, "-o", str(out), "--group-size", "32", "--calib-samples", "2",
                   "--calib-seqlen", "64")
    assert done.returncode == 0, done.stderr
    quality = json.loads((out / "nibble_quality.json").read_text())
    assert "kl" in json.dumps(quality).lower()
    card = (out / "README.md").read_text()
    assert "base_model" in card and "quantized" in card


def test_a_folder_that_is_in_use_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    done = convert(str(tiny_llama), "--awq", "-o", str(tmp_path))
    assert done.returncode == 2
    assert "--overwrite" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_truncated_checkpoint_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = convert(str(broken), "--gptq", "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
