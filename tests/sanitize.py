"""`make sanitize`: the C++ kernels' tests under AddressSanitizer with UBSan, and under ThreadSanitizer.

    python tests/sanitize.py [address] [thread]

Each builds the kernels with the sanitizer into a folder of its own and runs the tests with its runtime loaded first.
Only the kernels are instrumented: what torch and Python do is not looked at. Exits with 1 where one of them complains.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nibble.kernels.cpu.build import build, find_compiler

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/kernels/test_cpu_native.py", "tests/engine/backends/test_cpp_decoder.py"]
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer")
SANITIZERS = {  # flags, runtime, options
    "address": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": (
        ("-fsanitize=thread",),
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
    ),
}


def run(kind: str) -> int:
    """The exit code of the tests under one sanitizer."""
    flags, runtime, options = SANITIZERS[kind]
    compiler = find_compiler()
    where = subprocess.run(
        [compiler, f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libnibble_cpu.so"
        build(library, compiler, (*FLAGS, *flags))
        environment = (
            os.environ
            | options
            | {
                "LD_PRELOAD": where.stdout.strip(),
                "NIBBLE_TEST_CPU_LIBRARY": str(library),
                "OMP_NUM_THREADS": "1",
                "PYTHONMALLOC": "malloc",
            }
        )
        print(f"== {kind}", flush=True)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    codes = [run(kind) for kind in sys.argv[1:] or SANITIZERS]
    raise SystemExit(int(any(codes)))
