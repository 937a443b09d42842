"""The compile gate on a representative few; `make kernels-report` holds every configuration on every card to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parents[2] / "bench" / "kernels_report.py"


@pytest.mark.parametrize(("cc", "room", "kernel"), [
    (80, "gptq", "gemm 16x64 w4 s4 swap int4 g128 bf16"), (89, "gptq", "gemv int4 g128 fp16"),
    (90, "gptq", "gemm 16x64 w4 s4 swap int4 g128 fp16"), (75, "gptq", "dequantize int4 g128 fp16")])
def test_compiles_within_the_gate(cc: int, room: str, kernel: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(REPORT), "--room", room, "--cc", str(cc),
                           "--match", kernel], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "\n0 configurations" not in done.stdout
