"""Where and with what a figure was measured: every file in bench/results/ carries this."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def describe() -> dict[str, Any]:
    """CPU, cores, memory, load, versions, commit and command line."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _git("rev-parse", "--short=12", "HEAD")
        + ("+changes" if _git("status", "--porcelain") else ""),
        "machine": {
            "cpu": _first_value("/proc/cpuinfo", "model name")
            or platform.processor()
            or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "gpu": output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{
                name: _version(name)
                for name in (
                    "nibble-serve",
                    "torch",
                    "triton",
                    "transformers",
                    "tokenizers",
                    "uvicorn",
                )
            },
        },
    }


def save(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """Write bench/results/<date>-<name>.json, or `path`; paths inside the checkout are told from there."""
    path = path or RESULTS / f"{datetime.date.today().isoformat()}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1).replace(f"{ROOT}/", "") + "\n")
    return path


def peak_memory(pid: int) -> int:
    """The most bytes that a process has held so far; 0 where it is gone or the system does not say."""
    return int((_first_value(f"/proc/{pid}/status", "VmHWM") or "0").split()[0]) * 1024


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return output(["git", "-C", str(ROOT), *arguments]) or ""


def output(command: list[str]) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_value(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
