"""Disks that are full, folders that cannot be written, memory that is short, a port that is taken: the server serves
the same answers, or says in one line why not."""

import asyncio
import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import clients, models
from .conftest import SERVE, Record
from .harness import Server, complaint_in, end, serving, start, wait_for
from .results import Result

READY = "ready"


def _outcome(server: Server, seconds: float) -> tuple[int | str, str]:
    """What became of a server that may not come up: its exit code, READY or "nothing", and its log."""
    outcome: int | str = "nothing"

    def is_decided() -> bool:
        return server.process.poll() is not None or server.get("/readyz").status_code == 200

    if wait_for(is_decided, seconds):
        code = server.process.poll()
        outcome = READY if code is None else code
    text = server.log_text().strip()
    end(server)
    return outcome, text


def _said(outcome: int | str, text: str) -> str:
    return str(outcome) if isinstance(outcome, str) else f"exit code {outcome}: {text[-100:]}"


def short_memory(model: Path, folder: Path, gib: float) -> Result:
    """RLIMIT_AS, the KV cache left to the planner: the server comes up, or says in one line that it cannot."""
    limit = {resource.RLIMIT_AS: int(gib * 2**30)}
    outcome, text = _outcome(start(model, folder, limits=limit), 60)
    refused = outcome == 2 and text.rpartition("\n")[2].startswith("error: ")
    said = complaint_in(text)
    return Result(
        f"RLIMIT_AS of {gib:g} GiB",
        f"{_said(outcome, text)}{said}",
        "ready, or exit code 2 and one line",
        (outcome == READY or refused) and not said,
    )


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own for a folder; needs the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _same(server: Server, expected: dict) -> bool:
    return server.complete("abc", 16, logprobs=3)["choices"] == expected["choices"]


def full_disk(model: Path, folder: Path, expected: dict) -> Result:
    """The prepared weights' disk is full, but for a few pages: the same answers, no traceback, nothing half-written."""
    with disk(folder / "disk", 48) as small:
        (small / "filler").write_bytes(b"x" * (40 << 20))
        with serving(
            model, folder / "run", *SERVE, "--prepared-cache", str(small / "cache")
        ) as server:
            same, said = _same(server, expected), server.complaint()
        left = [f.name for f in small.rglob("*") if f.suffix in (".safetensors", ".tmp")]
    return Result(
        "a full disk under --prepared-cache",
        f"{'the same' if same else 'another'} answer, {len(left)} files left{said}",
        "the same answer, 0 files, no traceback",
        same and not left and not said,
    )


def read_only(model: Path, folder: Path, expected: dict) -> Result:
    """Model, cache and home cannot be written to."""
    with disk(folder / "disk", 128) as place:
        copied = models.copy(model, place / "model")
        for name in ("cache", "home"):
            (place / name).mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        home = {"HOME": str(place / "home")}
        cache = ("--prepared-cache", str(place / "cache"))
        with serving(copied, folder / "run", *SERVE, *cache, environment=home) as server:
            same, said = _same(server, expected), server.complaint()
    return Result(
        "model, cache and home on a read-only disk",
        f"{'the same' if same else 'another'} answer{said}",
        "the same answer, no traceback",
        same and not said,
    )


def log_disk_full(model: Path, folder: Path) -> Result:
    """The log goes to a disk that is full: requests are answered all the same."""
    with disk(folder / "disk", 1) as place, serving(model, place, *SERVE) as server:
        with contextlib.suppress(OSError):
            (place / "filler").write_bytes(b"x" * (2 << 20))
        asyncio.run(clients.ask(server.port, b"\x16\x03\x01\r\n\r\n", 5))  # which is logged
        works = all(server.complete()["choices"] for _ in range(5))
    figure = "serves on" if works else "serves no more"
    return Result("the log's disk is full", figure, "serves on", works)


def port_in_use(model: Path, folder: Path, port: int) -> Result:
    """A second server on the same port."""
    outcome, text = _outcome(start(model, folder, *SERVE, "--port", str(port)), 30)
    fine = outcome == 2 and text.count("\n") == 0 and text.startswith("error: ")
    return Result("the port is in use", _said(outcome, text), "exit code 2 and one line", fine)


def started_at_once(model: Path, folder: Path, rounds: int) -> Result:
    """Two servers started for one port at the same time: one serves, the other says why not in one line."""
    codes, wrong = [], 0
    for i in range(rounds):
        first = start(model, folder / f"{i}a", *SERVE)
        second = start(model, folder / f"{i}b", *SERVE, "--port", str(first.port))
        pair = (first, second)
        wait_for(lambda pair=pair: any(s.process.poll() is not None for s in pair), 60)
        wait_for(lambda first=first: first.get("/readyz").status_code == 200, 60)
        lost = [s for s in pair if s.process.poll() is not None]
        codes += [s.process.returncode for s in lost]
        wrong += len(lost) != 1 or not lost[0].log_text().startswith("error: ")
        for server in pair:
            end(server)
    return Result(
        f"two servers for one port at once, {rounds} times",
        f"exit codes of the losers {codes}, {wrong} rounds not as they should be",
        "one loser each time, exit code 2 and one line",
        not wrong and set(codes) == {2},
    )


@pytest.fixture(scope="module")
def expected(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the wide model answers without a cache."""
    folder = tmp_path_factory.mktemp("expected")
    with serving(wide, folder, *SERVE, "--prepared-cache", "none") as server:
        return server.complete("abc", 16, logprobs=3)


@pytest.mark.parametrize("gib", [1, 1.5, 2, 4, 8])
def test_short_memory(record: Record, tiny: Path, tmp_path: Path, gib: float) -> None:
    record(short_memory(tiny, tmp_path, gib))


def test_a_full_disk(record: Record, wide: Path, tmp_path: Path, expected: dict) -> None:
    record(full_disk(wide, tmp_path, expected))


def test_read_only_folders(record: Record, wide: Path, tmp_path: Path, expected: dict) -> None:
    record(read_only(wide, tmp_path, expected))


def test_a_full_disk_of_the_log(record: Record, tiny: Path, tmp_path: Path) -> None:
    record(log_disk_full(tiny, tmp_path))


def test_a_port_in_use(record: Record, server: Server, tiny: Path, tmp_path: Path) -> None:
    record(port_in_use(tiny, tmp_path, server.port))


def test_started_at_once(record: Record, tiny: Path, tmp_path: Path) -> None:
    record(started_at_once(tiny, tmp_path, 3))
