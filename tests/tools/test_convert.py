"""`nibble convert` as a user runs it: conversion, evaluation through the engine, accuracy card, exit codes."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nibble.cli import main
from nibble.kernels.cpu.library import why_missing
from nibble.tools.convert import _resumable

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("method", ["--awq", "--fp8"])
def test_a_conversion_carries_its_measured_quality(
    tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    done = convert(
        str(tiny_llama),
        method,
        "-o",
        str(out),
        "--group-size",
        "32",
        "--calib-samples",
        "2",
        "--calib-seqlen",
        "64",
    )
    assert done.returncode == 0, done.stderr
    quality = json.loads((out / "nibble_quality.json").read_text())
    assert [text["domain"] for text in quality["evaluation"]] == ["prose", "docs", "code"]
    for text in quality["evaluation"]:
        if (
            method == "--fp8" or why_missing()
        ):  # nothing here multiplies these weights with integers
            assert text["kl_mean_int8"] is None
        else:
            assert text["kl_mean"] / 2 < text["kl_mean_int8"] != text["kl_mean"]
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


@pytest.mark.parametrize(("arguments", "message"), [
    (["{tiny}/nowhere"], "nowhere: does not exist (give a folder, a .gguf file or a Hub id owner/name)"),
    (["{empty}"], "config.json: is missing"),
    (["{file}"], "is neither a folder nor a .gguf file"),
    (["{tiny}", "--bits", "3"], "--bits 3 is not possible with awq (4 are)"),
    (["{tiny}", "--group-size", "7"], "--group-size 7 is not possible (a multiple of 16, or -1)"),
    (["{tiny}", "--gptq"], "choose one of --awq, --gptq and --fp8, not 2"),
    (["{tiny}", "--to", "gptq_v2"], "--to gptq_v2 is not possible with --awq (awq, compressed-tensors are)"),
    (["{tiny}", "--fp8-scheme", "block"], "--fp8-scheme block is not possible with --awq"),
    (["{tiny}", "--requantize"], "--requantize goes with --to"),
    (["{tiny}", "--kv-scales"], "--kv-scales needs --to compressed-tensors"),
    (["{tiny}", "--calib", "{empty}/none.txt"], "none.txt: cannot be read as UTF-8 text"),
    (["{tiny}", "--calib-samples", "0"], "--calib-samples 0 x --calib-seqlen 512 is too little"),
    (["{tiny}", "--calib-seqlen", "9000"], "more than the 8192 positions that the model knows"),
    (["{tiny}", "-o", "{file}/out"], "cannot be made: Not a directory"),
    (["{tiny}", "--device", "cuda:0,cuda:1"], "is no device (give cpu, cuda or one of several"),
    (["{tiny}", "--device", "cuda:99"], "--device cuda:99: "),
])  # fmt: skip
def test_every_mistake_is_one_line_that_says_what_to_do(
    tiny_llama: Path, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    places = {"tiny": tiny_llama, "empty": tmp_path / "empty", "file": tmp_path / "weights.bin"}
    code = main(
        ["convert", "-o", str(tmp_path / "out"), "--awq", *(a.format(**places) for a in arguments)]
    )
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], said
    assert not list(tmp_path.glob("out*")) and "Traceback" not in said


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"model_type": "mixtral"},
            "model_type 'mixtral' cannot be converted yet (known: ",
        ),
        ("config.json", {"model_type": None}, "model_type None cannot be converted yet"),
        ("config.json", {"hidden_size": "wide"}, "config.json describes no model"),
        (
            "config.json",
            {"hidden_size": 96},
            "'model.layers.0.self_attn.q_proj.weight': has shape [64, 64], config.json",
        ),
        (
            "config.json",
            {"num_hidden_layers": 3},
            "'model.layers.2.self_attn.q_proj.weight': is missing",
        ),
        ("tokenizer.json", {}, "has no tokenizer that can be loaded"),
    ],
)
def test_a_folder_that_is_not_quite_a_model_is_named(
    tiny_llama: Path, tmp_path: Path, capsys, file: str, change: dict, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    content = json.loads((folder / file).read_text()) | change if change else {}
    (folder / file).write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    code = main(
        ["convert", str(folder), "--gptq", "-o", str(tmp_path / "out"), "--calib-seqlen", "32"]
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.glob("out*"))


def test_an_interrupt_that_other_code_swallows_is_not_lost(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _resumable(tmp_path / "out") as check_interrupt:
        check_interrupt()
        with suppress(KeyboardInterrupt):  # as Python does while it runs a destructor
            signal.raise_signal(signal.SIGINT)
        check_interrupt()
    assert signal.getsignal(signal.SIGINT) is before
