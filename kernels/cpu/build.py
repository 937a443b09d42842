"""Compiles the C++ kernels into one shared library: an object for every instruction set of the machine's architecture,
chosen at run time by what the CPU says it has.

    python kernels/cpu/build.py     builds in place, as `pip install -e .` does

The library carries a hash of the sources it was built from, so that a stale one is noticed. Standard library only:
setup.py runs this file before anything is installed.
"""

import hashlib
import platform
import shlex
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
_ALWAYS: dict[str, list[str]] = {"pool.cpp": [], "library.cpp": []}
FLAGS = {  # by architecture
    "x86_64": _ALWAYS
    | {
        "isa_avx2.cpp": _AVX2,
        "isa_avxvnni.cpp": [*_AVX2, "-mavxvnni"],
        "isa_avx512vnni.cpp": _AVX512,
        "isa_avx512bf16.cpp": [*_AVX512, "-mavx512bf16"],
    },
    "aarch64": _ALWAYS | {"isa_neon.cpp": ["-march=armv8.2-a+dotprod"]},
}
SOURCES = sorted({name for files in FLAGS.values() for name in files})


class BuildError(Exception):
    """There is no compiler, or it failed: the message says which."""


def headers() -> list[Path]:
    return sorted(HERE.glob("*.h"))


def source_hash() -> str | None:
    """A hash of every source file, or None where the sources are not here (an installed wheel)."""
    files = [*headers(), *(HERE / name for name in SOURCES)]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(
        b"\0".join(file.name.encode() + file.read_bytes() for file in files)
    ).hexdigest()[:16]


def architecture() -> str:
    """This machine's, by the name that Linux gives it."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def find_compiler() -> str:
    if architecture() not in FLAGS:
        raise BuildError(
            f"there are no kernels for {architecture()}, only for {' and '.join(FLAGS)}"
        )
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler (c++, g++, clang++) in PATH")


def build(library: Path, compiler: str | None = None, extra: tuple[str, ...] = ()) -> None:
    """Compile and link into `library`, in one rename. `extra` flags go to every file. Raises BuildError."""
    compiler = compiler or find_compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        objects = compile_objects(Path(scratch), compiler, architecture(), extra)
        linked = Path(scratch) / library.name
        run([*shlex.split(compiler), "-shared", *extra, *objects, "-o", str(linked), "-pthread"])
        linked.replace(library)


def compile_objects(
    folder: Path, compiler: str, target: str, extra: tuple[str, ...] = ()
) -> list[str]:
    """The object files of a target architecture, in `folder`. compiler: a command, with its first arguments if it has
    any. Raises BuildError."""
    common = [*shlex.split(compiler), *_COMMON, f'-DNB_SOURCES="{source_hash()}"']
    objects = {name: str(folder / f"{name}.o") for name in FLAGS[target]}
    commands = [
        [*common, *flags, *extra, "-c", str(HERE / name), "-o", objects[name]]
        for name, flags in FLAGS[target].items()
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, commands))
    return list(objects.values())


def run(command: list[str]) -> None:
    """Raises BuildError with what the command complains about."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    build(LIBRARY)
    print(LIBRARY)
