"""What the run makes of a script's lines, and the table it writes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients_run", Path(__file__).parent / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_lines_are_features_and_anything_else_is_none(run: ModuleType) -> None:
    said = 'noise\n{"feature": "a", "ok": true}\n{"feature": "b", "ok": false, "why": "no"}\n{"x": 1}\n'
    assert run.read_features(said, 0, "") == [run.Feature("a", True), run.Feature("b", False, "no")]


@pytest.mark.parametrize(
    ("said", "returncode", "log", "why"),
    [
        ('{"feature": "a", "ok": true}', 1, "Traceback\nImportError: x", "ImportError: x"),
        ("", 0, "", "it printed nothing"),
    ],
)
def test_a_script_that_fails_or_says_nothing_has_failed(
    run: ModuleType, said: str, returncode: int, log: str, why: str
) -> None:
    assert run.read_features(said, returncode, log)[-1] == run.Feature("script", False, why)


def test_the_table_says_what_works_and_why_the_rest_does_not(run: ModuleType) -> None:
    features = [
        run.Feature("chat", True),
        run.Feature("tools", False, "400"),
        run.Feature("x", True),
    ]
    results = [run.Result("one", "1.2", features), run.Result("two", "3", features[:1])]
    assert run.table(results).splitlines() == [
        "| Client | Version | Works | Does not |",
        "|---|---|---|---|",
        "| one | 1.2 | chat · x | tools |",
        "| two | 3 | chat |  |",
        "",
        "- one, tools: 400",
    ]


def test_every_client_has_its_script(run: ModuleType) -> None:
    scripts = {client.script for client in run.CLIENTS.values()}
    assert scripts == {
        file.name for file in run.SCRIPTS.iterdir() if file.suffix in (".py", ".mjs")
    } - {"report.py", "report.mjs"}
