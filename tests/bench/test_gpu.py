"""`make bench-gpu` without a GPU: its plans, its rows on a small CPU problem, what it makes of figures, and processes
that die or fall silent.
"""

import dataclasses
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gpu
import gpu_attention
import gpu_cells
import gpu_engine
import gpu_glue
import gpu_products
import gpu_report
import random_llama
import torch

from nibble import LLM, SamplingParams
from nibble.kernels.measure.timing import Card

SECTIONS = {
    "products": gpu_products,
    "attention": gpu_attention,
    "glue": gpu_glue,
    "engine": gpu_engine,
}


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> gpu_cells.Lab:
    """A CPU in the place of the GPU: every call runs once, and takes a microsecond."""

    def once(calls):
        for call in calls:
            call()
        return 1.0

    return gpu_cells.Lab(torch.device("cpu"), Card("card", 90, 132, 0), once, True)


def test_plans_name_every_cell_once() -> None:
    assert list(SECTIONS) == list(gpu.SECTIONS)
    for name, section in SECTIONS.items():
        for quick in (False, True):
            cells = section.plan(quick)
            assert len({cell.name for cell in cells}) == len(cells) > 0
            assert {cell.section for cell in cells} == {name}
        assert section.plan(True) != section.plan(False)


@pytest.mark.parametrize("kind", [*gpu_products.KINDS, gpu_report.DENSE])
def test_products_of_every_kind(kind: str, lab: gpu_cells.Lab) -> None:
    given = {"model": "m", "layer": "o", "n": 64, "k": 128, "kind": kind, "rows": (1, 3)}
    rows = list(gpu_products.measure(gpu_cells.Cell("products", kind, given), lab))
    assert [row.fields["m"] for row in rows] == [1, 3]
    for row in rows:
        y = row.calls[0]()
        assert y.shape == (row.fields["m"], 64) and bool(torch.isfinite(y).all())


@pytest.mark.parametrize("kind", [*gpu_attention.CACHES, gpu_report.SDPA])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_attention_of_every_cache(
    kind: str, phase: str, lab: gpu_cells.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HEADS", 4), ("KV_HEADS", 2), ("DIM", 64)):
        monkeypatch.setattr(gpu_attention, name, value)
    batch = 2 if phase == "decode" else 1
    cell = gpu_cells.Cell(
        "attention", kind, {"phase": phase, "batch": batch, "context": 32, "kind": kind}
    )
    (row,) = gpu_attention.measure(cell, lab)
    out = row.calls[0]()
    assert out.numel() == batch * (1 if phase == "decode" else 32) * 4 * 64 and bool(
        torch.isfinite(out).all()
    )


def test_glue_of_every_operation(lab: gpu_cells.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("HIDDEN", 128),
        ("INNER", 96),
        ("HEADS", 4),
        ("KV_HEADS", 2),
        ("DIM", 32),
        ("VOCAB", 300),
    ):
        monkeypatch.setattr(gpu_glue, name, value)
    for operation in gpu_glue.OPERATIONS:
        cell = gpu_cells.Cell("glue", operation, {"operation": operation, "m": 3})
        rows = list(gpu_glue.measure(cell, lab))
        assert rows[0].fields["kind"] == gpu_report.PLAIN and len(rows) >= 2
        for row in rows:
            row.calls[0]()


def test_a_failing_row_says_why_and_the_next_follows(
    lab: gpu_cells.Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Section:
        @staticmethod
        def measure(cell, lab):
            if cell.name == "bad":
                raise ValueError("no such weight")
            yield gpu_cells.Row({"m": 1}, [lambda: 1 / 0])
            yield gpu_cells.Row({"m": 2}, [lambda: 1])

    monkeypatch.setattr(gpu_cells, "_device_works", lambda: True)
    cells = [(i, gpu_cells.Cell("s", name)) for i, name in enumerate(("bad", "good"))]
    assert gpu_cells.run_cells(Section, cells, lab) == 0
    lines = [gpu_cells.json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("reason", line.get("us", "done")) for line in lines] == [
        "ValueError: no such weight",
        "done",
        "ZeroDivisionError: division by zero",
        1.0,
        "done",
    ]


CHILD = """
import json, sys, time
skip = int(sys.argv[1])
for cell in range(skip, 5):
    if cell == 1:
        sys.exit(3)
    if cell == 3:
        time.sleep(60)
    print("noise of a library")
    print(json.dumps({"cell": cell, "section": "s", "name": str(cell), "us": 1.0}), flush=True)
    print(json.dumps({"cell": cell, "section": "s", "name": str(cell), "done": True}), flush=True)
"""


def test_a_dead_or_silent_process_costs_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [gpu_cells.Cell("products", str(i)) for i in range(5)]
    monkeypatch.setattr(gpu_products, "plan", lambda quick: cells)
    monkeypatch.setattr(gpu, "SILENCE", 2)
    monkeypatch.setattr(
        gpu, "_command", lambda section, quick, flag, skip: [sys.executable, "-c", CHILD, skip]
    )
    rows = list(gpu.rows_of("products", True, time.monotonic() + 60))
    assert [(row["name"], "reason" in row) for row in rows] == [
        ("0", False),
        ("1", True),
        ("2", False),
        ("3", True),
        ("4", False),
    ]


def _product(kind: str, m: int, us: float, n: int = 28672, k: int = 4096) -> dict:
    return {
        "section": "products",
        "name": f"{kind} {m}",
        "model": "Llama-3-8B",
        "layer": "gate_up",
        "n": n,
        "k": k,
        "kind": kind,
        "m": m,
        "us": us,
        "bytes": n * k // 2,
    }


def test_ratios_and_goals_follow_from_the_rows() -> None:
    rows = [
        _product(gpu_report.DENSE, 1, 60.0),
        _product("int4 g128 asym", 1, 20.0),
        _product("int4 g128 asym", 16, 22.0),
        _product("fp8", 1, 40.0),
        _product(gpu_report.INT4PACK, 1, 25.0),
        {"section": "products", "name": "gemlite", "reason": "not installed"},
        {
            "section": "attention",
            "name": "d",
            "phase": "decode",
            "batch": 32,
            "context": 4096,
            "kind": "bf16",
            "us": 100.0,
            "bytes": 10**9 // 3,
        },
        {
            "section": "engine",
            "name": "e",
            "format": "awq",
            "figure": "tokens per second at 1",
            "value": 510.0,
        },
    ]
    rows = gpu_report.with_ratios(rows, 4e12)
    assert rows[1]["ratios"] == {gpu_report.DENSE: 3.0, gpu_report.INT4PACK: 1.25}
    assert rows[1]["share"] == pytest.approx(58720256 / 20e-6 / 4e12, abs=1e-3)
    assert rows[2]["ratios"] == {}, "no peer's product of 16 rows was measured"
    met = {goal.split(":")[0]: met for goal, _, met in gpu_report.goals(rows)}
    assert met["G1 W4A16, 1 to 16 rows, 58 M weights or more"] is False
    assert met["G1 W4A16, 16 rows over 1 row"] is True
    assert met["G5 FP8, up to 64 rows"] is False and met["G5 FP8, 1024 rows"] is None
    assert met["G4 decode attention, 4k and more, 16 sequences and more"] is False
    assert met["G2 Llama-3-8B awq, 1 at once"] is True
    assert sum(table.row_count for table in gpu_report.tables(rows)) == len(rows)
    assert gpu_report.goals_table(rows).row_count == len(gpu_report.goals(rows))


def test_a_run_leaves_its_rows_and_says_what_was_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = {"name": "A Card", "copy_bytes_per_second": 4e12}
    rows = [_product(gpu_report.DENSE, 1, 60.0), _product("int4 g128 asym", 1, 18.0)]
    monkeypatch.setattr(gpu, "card", lambda: found)
    monkeypatch.setattr(gpu, "warm", lambda *args: None)
    monkeypatch.setattr(gpu, "rows_of", lambda section, quick, deadline: iter(rows))
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--sections", "products", "--out", str(tmp_path / "r.json")]
    )
    assert gpu.main() == 0
    written = gpu_cells.json.loads((tmp_path / "r.json").read_text())
    assert written["card"] == found and len(written["rows"]) == 2 and written["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "3.33" in shown and "not measured" in shown and "met" in shown and "r.json" in shown


def test_the_engines_figures_are_those_of_the_goals(
    lab: gpu_cells.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model, end to end, another process for its start included."""
    shape = dataclasses.replace(
        random_llama.Shape(), hidden=256, inner=384, layers=1, heads=4, kv_heads=2, vocab=30000
    )
    monkeypatch.setattr(random_llama, "Shape", lambda: shape)
    monkeypatch.setattr(gpu_engine, "PROMPTS", (16, 32))
    monkeypatch.setattr(gpu_engine, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu_engine, "ENGINE", {"max_model_len": 128, "prepared_cache": None})
    cell = gpu_cells.Cell("engine", "small", {"format": "awq", "tokens": 4})
    rows = [row.fields for row in gpu_engine.measure(cell, lab)]
    assert [row["figure"] for row in rows] == [
        "time to first token at 16, ms",
        "time to first token at 32, ms",
        "tokens per second at 1",
        "tokens per second at 2",
        gpu_engine.STARTED,
    ]
    assert all(row["value"] > 0 for row in rows)
    goals = gpu_report.goals([{"section": "engine", "name": "small", **row} for row in rows])
    assert {met for goal, _, met in goals if goal.startswith(("G2", "G9"))} <= {True, False}


@pytest.mark.parametrize("fmt", list(random_llama.FORMATS))
def test_random_checkpoints_are_served(fmt: str, tmp_path: Path) -> None:
    shape = dataclasses.replace(
        random_llama.Shape(), hidden=256, inner=384, layers=2, heads=4, kv_heads=2, vocab=500
    )
    random_llama.write(tmp_path / "model", fmt, shape, torch.device("cpu"))
    llm = LLM(str(tmp_path / "model"), device="cpu", max_model_len=32, prepared_cache=None)
    done = llm.generate(
        [[5, 6, 7], [8]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    )
    assert [len(completion.token_ids) for completion in done] == [4, 4]
