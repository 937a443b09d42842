"""The compile gate on one configuration of each kernel for each card; `make kernels-report` holds all to it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.kernels.measure.compile_cases import PACKAGES

pytest.importorskip("triton")

REPORT = Path(__file__).parents[3] / "bench" / "kernels_report.py"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("package", PACKAGES)
def test_compiles_within_the_gate(package: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPORT), "--package", package, "--first"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = re.findall(r"^ +(\d+) \S.* \d", done.stdout, re.MULTILINE)
    assert set(rows) == {str(cc) for cc in (75, 80, 86, 89, 90, 100, 120)}, "a card was left out"
