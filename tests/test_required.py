"""NIBBLE_TESTS_REQUIRE: where it names what is missing, no test runs and the run fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("required", "code", "said"),
    [
        ("cpp,triton", 4, "required, but missing: triton: no Triton here"),
        ("triton", 4, "required, but missing: triton: no Triton here"),
        ("tritn", 4, "NIBBLE_TESTS_REQUIRE=tritn: give some of cpp,triton"),
        ("", 0, "1 test collected"),
    ],
)
def test_what_is_required_and_missing_ends_the_run(tmp_path, required, code, said) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
         "tests/test_house.py::test_every_package_is_installed"],
        cwd=ROOT,
        env=os.environ | {"NIBBLE_TESTS_REQUIRE": required, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == code and said in done.stdout + done.stderr
