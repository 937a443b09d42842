"""`nibble convert` as a user runs it: conversion, evaluation through the engine, accuracy card, exit codes."""

import inspect
import io
import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from rich.console import Console

import nibble
from nibble.cli import main
from nibble.kernels.cpu.library import why_missing
from nibble.quant.conversion.recipe import Recipe
from nibble.tools import progress
from nibble.tools.convert import default_output
from nibble.tools.convert_command import _resumable

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


FAST = ("--calib-samples", "2", "--calib-seqlen", "32", "--group-size", "32")
BARE = [sys.executable, "-E", "-S"]  # a Python that has only its own library


def test_a_python_without_the_packages_says_what_to_do() -> None:
    done = subprocess.run([*BARE, str(SCRIPT), "--awq"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "typer" in done.stderr and "make install" in done.stderr
    assert f"pip install -e {SCRIPT.parents[1]}" in done.stderr


def test_a_checkout_runs_without_being_installed(tiny_llama: Path, tmp_path: Path) -> None:
    """With the packages, but not `nibble`, which an editable install adds through a .pth file alone."""
    packages = str(Path(typer.__file__).parents[1])
    env = {"PYTHONPATH": packages, "PATH": "", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-S", "-P"]
    absent = subprocess.run([*python, "-c", "import nibble"], env=env, capture_output=True, cwd="/")
    if absent.returncode == 0:
        pytest.skip("nibble itself lies in site-packages")
    arguments = (str(tiny_llama), "--fp8", "--no-eval", "-o", str(tmp_path / "out"))
    done = subprocess.run(
        [*python[:2], str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_without_a_model_it_says_what_to_give(capsys) -> None:
    assert main(["convert", "--awq"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "MODEL" in said and "nibble convert HuggingFaceTB/" in said


@pytest.mark.parametrize(("options", "name"), [
    ({"method": "awq"}, "smol-AWQ-INT4-g128"),
    ({"method": "gptq", "bits": 3, "group_size": 64}, "smol-GPTQ-INT3-g64"),
    ({"method": "gptq", "group_size": -1}, "smol-GPTQ-INT4"),
    ({"method": "gptq", "auto_bits": 3.5}, "smol-GPTQ-AUTO3.5-g128"),
    ({"method": "fp8"}, "smol-FP8"),
    ({"method": "fp8", "fp8_scheme": "block"}, "smol-FP8-block"),
])  # fmt: skip
def test_an_output_by_default(tmp_path: Path, options: dict, name: str) -> None:
    recipe = Recipe.of(**options)
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol.gguf").touch()
    for model in ("owner/smol", tmp_path / "smol", f"{tmp_path}/smol.gguf"):
        assert default_output(model, recipe) == Path(name)


def test_the_default_output_is_told_first(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = convert(str(tiny_llama), "--fp8", "--no-eval")
    assert done.returncode == 0, done.stderr
    assert "goes to ./tiny-llama-FP8" in done.stderr.splitlines()[0]
    assert (tmp_path / "tiny-llama-FP8" / "README.md").exists()


def test_the_python_api_writes_the_same_card(tiny_llama: Path, tmp_path: Path) -> None:
    doing = []
    fast = {"group_size": 32, "calib_samples": 2, "calib_seqlen": 32}
    out = nibble.convert(
        tiny_llama, tmp_path / "out", progress=lambda p: doing.append((p.doing, p.block)), **fast
    )
    quality = json.loads((out / "nibble_quality.json").read_text())
    assert [text["domain"] for text in quality["evaluation"]] == ["prose", "docs", "code"]
    assert "Not measured" not in (out / "README.md").read_text()
    windows = [block for what, block in doing if what == "Measuring"]
    assert windows == list(range(13)) and ("Quantizing", 2) in doing
    silent = nibble.convert(tiny_llama, tmp_path / "silent", evaluate=False, **fast)
    assert "Not measured" in (silent / "README.md").read_text()
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (silent / weights).read_bytes()


def test_the_python_api_has_every_option_of_the_command() -> None:
    from nibble.tools.convert_command import convert_command

    given = set(inspect.signature(nibble.convert).parameters)
    spelt = {"awq": "method", "gptq": "method", "fp8": "method", "no_eval": "evaluate"}
    options = {spelt.get(name, name) for name in inspect.signature(convert_command).parameters}
    assert options - given == {
        "requantize",
        "dry",
    }  # reformat and dry_run are functions of their own


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(
        progress,
        "console",
        Console(file=written, force_terminal=True, color_system=None, width=100),
    )
    return written


def test_no_bar_is_drawn_above_bad_input(terminal: io.StringIO, tmp_path: Path, capsys) -> None:
    missing = str(tmp_path / "none")
    assert main(["convert", missing, "--awq", "-o", str(tmp_path / "out")]) == 2
    assert main(["evaluate", missing, missing]) == 2
    assert capsys.readouterr().err.count("error: ") == 2 and not terminal.getvalue()


def test_a_bar_is_drawn_for_work(terminal: io.StringIO, tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ("--awq", "--no-eval", "-o", str(tmp_path / "out"), *FAST)
    assert main(["convert", str(tiny_llama), *arguments]) == 0
    assert "Quantizing" in terminal.getvalue() and "2/2 blocks" in terminal.getvalue()


def test_a_dry_run_of_chosen_bits_announces_no_others(
    tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    arguments = ("--gptq", "--auto-bits", "3.5", "--dry-run", "-o", str(tmp_path / "out"))
    assert main(["convert", str(tiny_llama), *arguments]) == 0
    said = capsys.readouterr()
    assert "14 layers to gptq of 3.5 bits on average, each layer one of 2, 3, 4, 8" in said.err
    assert "otherwise" not in said.err and not (tmp_path / "out").exists()


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
    assert "Quantized with Nibble" in card and "Not measured" not in card


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
    (["{file}"], "is neither a folder nor a GGUF file"),
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
            {"architectures": ["NoSuchForCausalLM"]},
            "architecture NoSuchForCausalLM",
        ),
        ("config.json", {"model_type": None}, "config.json describes no model"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size is 'wide', want a positive integer"),
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
