"""Conversions killed at random moments and resumed: the result is that of one that was never killed, to the byte, and
until it is whole there is no result."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Record
from .harness import complaint_in
from .results import Result

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
OPTIONS = ("--group-size", "32", "--calib-samples", "8", "--calib-seqlen", "64", "--no-eval")
NOT_BYTES = ("README.md", "nibble_quality.json")  # they say how long it took
SEED = 12


def _convert(model: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nibble", "convert", str(model), "-o", str(out), *OPTIONS]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=out.parent,
            env=os.environ | ENVIRONMENT,
        )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in NOT_BYTES}


def killed_and_resumed(model: Path, folder: Path, method: str, points: int) -> Result:
    """Kill one conversion at so many moments, drawn evenly over its length, each time from the start and resumed
    once."""
    whole = folder / "whole"
    begin = time.monotonic()
    if code := _convert(model, whole, method).wait():
        raise RuntimeError(f"exit code {code}: {whole.with_suffix('.log').read_text()}")
    length = time.monotonic() - begin
    draw = random.Random(SEED)
    killed = same = early = 0
    codes = []
    for i in range(points):
        out = folder / f"out{i}"
        process = _convert(model, out, method)
        time.sleep(length * (i + draw.random()) / points)
        process.send_signal(signal.SIGKILL if i % 3 else signal.SIGINT)
        killed += process.wait() != 0
        if out.exists():  # it was whole before it could be killed, or it may not be there
            early += _bytes(out) != _bytes(whole)
        else:
            codes.append(_convert(model, out, method, "--resume").wait())
        same += out.exists() and _bytes(out) == _bytes(whole)
    log = "".join(f.read_text() for f in folder.glob("out*.log"))
    said = complaint_in(log)
    return Result(
        f"{method[2:].upper()} conversion killed and resumed at {points} moments",
        f"{killed} killed, {same} of {points} the same bytes, {early} half results{said}",
        f"all the same, {points // 2} killed or more, no traceback",
        same == points and killed >= points // 2 and not early and not any(codes) and not said,
    )


@pytest.mark.parametrize("method", ["--awq", "--gptq"])
def test_killed_and_resumed(
    record: Record, tiny_llama: Path, tmp_path: Path, method: str, quick: bool
) -> None:
    record(killed_and_resumed(tiny_llama, tmp_path, method, 2 if quick else 10))
