"""`make bench-gpu`: the Triton kernels and the engine on this machine's GPU, beside torch's own and other libraries'.

    python bench/gpu.py [--quick] [--sections products attention glue engine] [--minutes 9]

    products    each projection of Llama-3-8B, Llama-3-70B and Qwen2.5-7B, 1 to 1024 rows, by kind of weight
    attention   decode and prefill over a paged cache in bf16, FP8 and INT8
    glue        norms, rotary embedding and KV write, activation, choice of tokens
    engine      a whole Llama-3-8B of random weights in bf16, AWQ and FP8: start-up, first token, tokens per second

Each section runs in a process of its own, so that a kernel that breaks the device costs one cell: the next process goes
on behind it. First, several processes compile what will be timed. Weights and caches are rotated past the L2 cache;
times are medians over captured graphs. Results: tables on the terminal, everything in
bench/results/DATE-gpu-CARD.json (with the sections' names where not all are measured), written again after each row.
What does not run says why. --minutes ends the run in time with what there is.
"""

import argparse
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_report
import machine
from rich.console import Console

SECTIONS = ("products", "attention", "glue", "engine")
SILENCE = (
    240  # seconds without a row after which a cell is given up; the engine's first takes longest
)
MAX_WARMERS = 8
console = Console(stderr=True)


def child(args: argparse.Namespace) -> int:
    """Measure one section from cell `--skip` on, or (`--warm I/N`) only compile every N-th cell."""
    from gpu_cells import Lab, describe_card, run_cells

    if args.child == "card":
        print(json.dumps(describe_card()))
        return 0
    section = importlib.import_module(f"gpu_{args.child}")
    cells = list(enumerate(section.plan(args.quick)))[args.skip :]
    if args.warm:
        part, parts = map(int, args.warm.split("/"))
        cells = cells[part::parts]
    return run_cells(section, cells, Lab.open(bool(args.warm)))


def card() -> dict[str, Any]:
    """The GPU, its driver, and the bandwidth with which torch copies on it."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", "card"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"no GPU to measure: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    limits = machine.output(["nvidia-smi", query, "--format=csv,noheader"])
    return json.loads(done.stdout.splitlines()[-1]) | {"driver, clocks, power limit": limits}


def warm(sections: list[str], quick: bool, deadline: float) -> None:
    """Compile in several processes; what fails here fails again, with its reason, when it is timed."""
    count = min(MAX_WARMERS, len(os.sched_getaffinity(0)))
    for section in sections:
        if section == "engine":
            continue
        running = [
            subprocess.Popen(
                _command(section, quick, "--warm", f"{part}/{count}"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for part in range(count)
        ]
        for process in running:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def rows_of(section: str, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Every row of a section, from as many processes as it takes."""
    cells = importlib.import_module(f"gpu_{section}").plan(quick)
    skip = 0
    while skip < len(cells):
        for row in _child_rows(_command(section, quick, "--skip", str(skip)), deadline):
            if row.pop("done", False):
                skip = row["cell"] + 1
            else:
                yield row
        if time.monotonic() > deadline or skip >= len(cells):
            return
        yield {
            "section": section,
            "name": cells[skip].name,
            "reason": "this cell ended its process",
        }
        skip += 1


def _command(section: str, quick: bool, *more: str) -> list[str]:
    return [sys.executable, __file__, "--child", section, *(["--quick"] if quick else []), *more]


def _child_rows(command: list[str], deadline: float) -> Iterator[dict[str, Any]]:
    """The lines of JSON that a process prints, until it ends, is silent for too long, or the time is up."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (left := min(SILENCE, deadline - time.monotonic())) > 0:
            line = lines.get(timeout=left)
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
    except queue.Empty:
        console.print(f"{command[3]}: nothing heard for {left:.0f} s", style="yellow")
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="Llama-3-8B, few rows and contexts: minutes in all"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="end after so many, with what there is"
    )
    parser.add_argument("--out", type=Path, help="write here, not to bench/results")
    parser.add_argument("--child", choices=("card", *SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return child(args) if args.child else run(args)


def run(args: argparse.Namespace) -> int:
    """All sections, one after the other."""
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {
        "what": "kernels and engine on a GPU",
        **machine.describe(),
        "card": card(),
    }
    bandwidth = result["card"]["copy_bytes_per_second"]
    console.print(f"{result['card']['name']}: copies at {bandwidth / 1e12:.2f} TB/s")
    warm(args.sections, args.quick, deadline)
    some = [] if len(args.sections) == len(SECTIONS) else args.sections
    name = "-".join(["gpu", re.sub(r"\W+", "-", result["card"]["name"]), *some])
    measured: list[dict[str, Any]] = []
    path = args.out
    for section in args.sections:
        for row in rows_of(section, args.quick, deadline):
            measured.append(row)
            console.print(
                f"{section}: {row['name']} {row.get('m', '')} {row.get('us', row.get('value', ''))} "
                f"{row.get('reason', '')}",
                highlight=False,
            )
            result["rows"] = gpu_report.with_ratios(measured, bandwidth)
            path = machine.save(name, result, args.out)
    shown = Console(width=140)
    for table in (
        *gpu_report.tables(result.get("rows", [])),
        gpu_report.goals_table(result.get("rows", [])),
    ):
        shown.print(table)
    if time.monotonic() > deadline:
        print(f"stopped after {args.minutes:g} minutes: what is missing was not measured")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
