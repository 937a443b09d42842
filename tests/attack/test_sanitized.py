"""Some of the attacks once more, with the C++ kernels under AddressSanitizer and UBSan, and Python's faulthandler on:
what writes out of bounds ends the engine here, and says where."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nibble.kernels.cpu.build import build, find_compiler

from . import test_clients, test_corpus, test_determinism
from .conftest import SERVE, Record
from .harness import Server, serving
from .results import Result

FLAGS = (
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
# Python runs a module of this name in every process that finds it: the engine's takes the other library.
CUSTOMIZE = """
import nibble.kernels.cpu.library as library
from pathlib import Path
library.LIBRARY = Path({library!r})
"""
COMPLAINTS = ("AddressSanitizer", "runtime error:", "Fatal Python error", "Traceback")


@pytest.fixture(scope="module")
def sanitized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine runs the instrumented library."""
    folder = tmp_path_factory.mktemp("sanitized")
    library = folder / "libnibble_cpu_address.so"
    compiler = find_compiler()
    build(library, compiler, FLAGS)
    where = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    (folder / "sitecustomize.py").write_text(CUSTOMIZE.format(library=str(library)))
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": where.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    with serving(tiny, folder / "run", *SERVE, environment=environment) as server:
        if str(library) not in Path(f"/proc/{server.engine_pid()}/maps").read_text():
            raise RuntimeError("the engine does not run the instrumented library")
        yield server


def quiet(server: Server) -> Result:
    """Nothing was complained of, and the engine is the one that was started."""
    found = [complaint for complaint in COMPLAINTS if complaint in server.log_text()]
    works = server.get("/health").status_code == 200
    return Result(
        "AddressSanitizer, UBSan and faulthandler",
        f"{', '.join(found) or 'no complaint'}, {'serves on' if works else 'serves no more'}",
        "no complaint, serves on",
        not found and works,
    )


def test_malformed_requests(record: Record, sanitized: Server) -> None:
    record(*test_corpus.malformed(sanitized, every=5))


def test_storm(record: Record, sanitized: Server) -> None:
    record(test_clients.storm(sanitized, 100, 1))


def test_determinism_(record: Record, sanitized: Server) -> None:
    record(test_determinism.in_a_batch(sanitized), test_determinism.from_the_cache(sanitized))


def test_zz_no_complaint(record: Record, sanitized: Server) -> None:
    record(quiet(sanitized))
