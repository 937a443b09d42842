"""`nibble tune` where there is no GPU, and what it would measure where there is one."""

import inspect
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nibble.cli import main
from nibble.kernels.dequant_gemm.candidates import DEQUANTIZE, Measurement, Trial
from nibble.kernels.dequant_gemm.tiles import Table, Tile
from nibble.tools import tune, tune_command


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_one_clear_error(capsys: pytest.CaptureFixture) -> None:
    assert main(["tune"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "NVIDIA GPU, and torch sees none" in lines[0]


def test_help_names_every_kind_of_weights() -> None:
    """Which are written out in the verb: its help imports no torch."""
    shown = inspect.signature(tune_command.tune_command).parameters["weights"].annotation
    assert shown.__metadata__[0].help.split(";")[0] == ", ".join(tune.WEIGHTS)


def test_shapes_are_the_models_fused_projections(tiny_llama: Path) -> None:
    assert tune.shapes_of(str(tiny_llama)) == ((128, 64), (64, 64), (256, 64), (64, 128))
    assert tune.weights_of(str(tiny_llama)) is None


def test_what_is_printed_is_what_serves() -> None:
    table = Table(
        90,
        1,
        64,
        4,
        40,
        (
            Tile(16, 16, 64, 4, 3, True, max_group=32),
            Tile(16, 16, 64, 4, 4, True),
            Tile(64, 64, 64, 4, 3, True),
            Tile(128, 64, 64, 8, 3, True),
        ),
        weights=("int4",),
    )
    written = io.StringIO()
    Console(width=100, file=written).print(tune_command._printed(table))
    text = written.getvalue()
    assert all(
        part in text for part in ("1 to 1", "2 to 16", "16x64 w4 s4 swap", "17 to 39", "from 40")
    )
    assert "s3 swap k2" in text and "w8" not in text


SHAPES = ((64, 64), (128, 64))


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> tune.Tuner:
    """Of an invented card, whose processes are threads."""
    monkeypatch.setattr(tune.Card, "of", lambda device: tune.Card("card", 90, 132, 50 << 20))
    monkeypatch.setattr(tune, "_origin", lambda card, shapes: "invented")
    with ThreadPoolExecutor(2) as pool:
        yield tune.Tuner(SHAPES, torch.device("cuda", 0), pool, lambda *told: None)


class Subject:
    """More rows take longer; what swaps is fastest, and dequantization from 128 rows on."""

    def measure(self, trial: Trial) -> Measurement:
        tile = trial.candidate.tile
        return Measurement(
            trial,
            100.0 if tile is None else trial.rows * (1.0 - 0.5 * tile.swap + 0.1 * tile.stages),
        )


def test_every_kind_of_weights_gets_its_table(
    tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = pytest.importorskip("nibble.kernels.dequant_gemm.trial")
    asked = []

    def reasons(kind, index, trials):
        asked.append((kind.group, trials[0].shape))
        return [
            "spills 4 registers"
            if kind.group == 32 and t.candidate.tile and t.candidate.tile.stages == 3
            else ""
            for t in trials
        ]

    monkeypatch.setattr(trial, "reasons", reasons)
    monkeypatch.setattr(trial, "subject", lambda kind, shape, index: Subject())
    table = tuner.measure("int4")
    assert set(asked) == {(group, shape) for group in (128, 32) for shape in SHAPES}
    assert table.weights == ("int2", "int3", "int4") and table.origin == "invented"
    assert table.tile(16).stages == 3 and table.tile(16).swap and table.tile(16, 32).stages == 4
    assert table.dequantize_rows == 256 and tuner.measure("fp8").weights == ("fp8",)


def test_a_product_that_cannot_be_computed_is_an_error(
    tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [Measurement(Trial((64, 64), 1, DEQUANTIZE), reason="is wrong by 1")]
    monkeypatch.setattr(tune.Tuner, "_run", lambda self, label, kind, trials: broken)
    with pytest.raises(tune.UserError, match=r"int8: dequantization of \(64, 64\) is wrong by 1"):
        tuner.measure("int8")
