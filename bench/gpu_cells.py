"""What the sections of `make bench-gpu` share: cells to plan, rows to measure, and the loop that a child process runs.

A section is a module with two functions:

    plan(quick) -> list[Cell]             what to measure; needs no GPU
    measure(cell, lab) -> iterator[Row]   prepares a cell on the device and yields its rows, one figure each

Every row is printed as one line of JSON as soon as it is measured. A row that fails says why and the next one follows;
a failure that breaks the device ends the process, and the parent starts another behind it.
"""

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nibble.kernels.measure.timing import Card, copy_bandwidth, microseconds, rotations

BROKEN_DEVICE = 3  # exit status: start another process behind the cell that was reported last


@dataclass(frozen=True, slots=True)
class Cell:
    """What is prepared once: one weight, one cache, one model."""

    section: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `calls` are timed, one for each rotated operand. Without calls, the fields are the figures."""

    fields: dict[str, Any]
    calls: Sequence[Callable[[], object]] = ()


@dataclass(frozen=True, slots=True)
class Lab:
    """The device, and how to time on it."""

    device: torch.device
    card: Card
    time: Callable[[Sequence[Callable[[], object]]], float]
    rotate: bool

    @classmethod
    def open(cls, warm: bool) -> "Lab":
        """warm: everything is called once, which compiles it, and nothing is timed."""
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        return cls(device, Card.of(device), _once if warm else microseconds, not warm)

    def copies(self, nbytes: int) -> int:
        """How many operands of that size calls must take in turn for the L2 cache not to flatter them."""
        return rotations(nbytes, self.card.l2_bytes) if self.rotate else 1


def _once(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    torch.cuda.synchronize()
    return 0.0


def describe_card() -> dict[str, Any]:
    """The GPU, and the bandwidth with which torch copies on it. Ends the process where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    card = Card.of(device)
    return {
        "name": card.name,
        "capability": card.cc / 10,
        "multiprocessors": card.num_sms,
        "l2_mib": card.l2_bytes >> 20,
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": round(copy_bandwidth(device)),
    }


def run_cells(section: Any, cells: list[tuple[int, Cell]], lab: Lab) -> int:
    """Measure cells in order, each with its index in the plan. Returns the exit status."""
    for index, cell in cells:
        try:
            with torch.inference_mode():
                for row in section.measure(cell, lab):
                    _tell(index, cell, row.fields | _timed(row, lab))
        except Exception as error:  # whatever it is, the next cell may work
            _tell(index, cell, {"reason": _reason(error)})
        gc.collect()
        if not _device_works():
            return BROKEN_DEVICE
        torch.cuda.empty_cache()
        _tell(index, cell, {"done": True})
    return 0


def _timed(row: Row, lab: Lab) -> dict[str, Any]:
    if not row.calls:
        return {}
    try:
        return {"us": round(lab.time(row.calls), 3)}
    except Exception as error:  # as above
        return {"reason": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _device_works() -> bool:
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def _tell(index: int, cell: Cell, fields: dict[str, Any]) -> None:
    print(
        json.dumps({"cell": index, "section": cell.section, "name": cell.name, **fields}),
        flush=True,
    )
    sys.stdout.flush()
