"""Compiles the C++ kernels into one shared library: an object for every instruction set, chosen at run time by cpuid.

    python kernels/cpu/build.py     builds in place, as `pip install -e .` does

The library carries a hash of the sources it was built from, so that a stale one is noticed. Standard library only:
setup.py runs this file before anything is installed.
"""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libnibble_cpu.so"
_COMMON = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
FLAGS = {
    "pool.cpp": [],
    "library.cpp": [],
    "isa_avx2.cpp": _AVX2,
    "isa_avxvnni.cpp": [*_AVX2, "-mavxvnni"],
    "isa_avx512vnni.cpp": _AVX512,
    "isa_avx512bf16.cpp": [*_AVX512, "-mavx512bf16"],
}


class BuildError(Exception):
    """There is no compiler, or it failed: the message says which."""


def headers() -> list[Path]:
    return sorted(HERE.glob("*.h"))


def source_hash() -> str | None:
    """A hash of every source file, or None where the sources are not here (an installed wheel)."""
    files = [*headers(), *(HERE / name for name in sorted(FLAGS))]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]


def find_compiler() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"there are no kernels for {platform.machine()} yet, only for x86-64")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler (c++, g++, clang++) in PATH")


def build(library: Path, compiler: str | None = None, extra: tuple[str, ...] = ()) -> None:
    """Compile and link into `library`, in one rename. `extra` flags go to every file. Raises BuildError."""
    compiler = compiler or find_compiler()
    flags = [*_COMMON, *extra, f'-DNB_SOURCES="{source_hash()}"']
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        objects = [str(Path(scratch) / f"{name}.o") for name in FLAGS]
        commands = [[compiler, *flags, *FLAGS[name], "-c", str(HERE / name), "-o", out]
                    for name, out in zip(FLAGS, objects, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", *extra, *objects, "-o", str(linked), "-pthread"])
        linked.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    build(LIBRARY)
    print(LIBRARY)
