"""The compile gate on one configuration of each kernel for each card; `make kernels-report` holds all to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parents[2] / "bench" / "kernels_report.py"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("room", ["gptq", "fp8", "attention", "fused"])
def test_compiles_within_the_gate(room: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPORT), "--room", room, "--first"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "\n0 configurations" not in done.stdout
