"""`make mutants`: change one number of the product at a time and see whether the tests named beside it notice.

Each entry of mutants.toml is one change (exact text, which must occur once: a list that has drifted from the code is an
error) and the tests that must fail with it. The tree is copied to a temporary folder; the checkout is not touched.

    killed      a test failed, or hung       as it should be
    survived    no test failed               allowed only if survivors.txt names it, and that file may only shrink:
                                             a name in it whose mutant dies must be removed
    unusable    the text is not there, the tests do not pass without the change, or nothing ran with it
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIMEOUT, BASELINE_TIMEOUT = 600, 3600  # seconds; tests that hang have noticed
MARKS = "not slow and not gpu and not network"
# Tests start from a process that has loaded what takes longest to load.
_PROCESSES = multiprocessing.get_context("forkserver")
_PRELOADED = ("pytest", "hypothesis", "gguf", "torch._dynamo", "fastapi", "openai")
_MODELS = ("llama.modeling_llama", "gemma3.modeling_gemma3")
_PROCESSES.set_forkserver_preload([*_PRELOADED, *(f"transformers.models.{m}" for m in _MODELS)])
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change. why: what a user would lose if it went unnoticed."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def applied(self, text: str) -> str:
        """The file's text with the change. Raises ValueError unless `old` occurs exactly once."""
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(f"{self.file}: {self.old!r} occurs {found} times, want 1")
        return text.replace(self.old, self.new)


def load(file: Path = HERE / "mutants.toml") -> list[Mutant]:
    """The list. Raises ValueError for a name given twice."""
    entries = tomllib.loads(file.read_text())["mutant"]
    mutants = [Mutant(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]
    if twice := [name for name, count in Counter(m.name for m in mutants).items() if count > 1]:
        raise ValueError(f"names given twice: {', '.join(twice)}")
    return mutants


def survivors(file: Path = HERE / "survivors.txt") -> set[str]:
    """The names that are known to survive."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return {line for line in lines if line}


def copy_tree(folder: Path) -> Path:
    """The checkout as it is, with what was built in it, as folder/nibble."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    built = [str(file.relative_to(ROOT)) for file in ROOT.glob("kernels/cpu/*.so")]
    for name in [*listed.stdout.decode().split("\0"), *built]:
        if name and (ROOT / name).is_file():
            (folder / "nibble" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "nibble" / name)
    return folder / "nibble"


def run_tests(tree: Path, tests: tuple[str, ...], timeout: float = TIMEOUT) -> tuple[int, str]:
    """pytest's exit code (1 also for a run that hung or crashed) and its last lines."""
    said = tree.parent / "output.txt"
    child = _PROCESSES.Process(target=_pytest, args=(tree, tests, said))
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        child.join()
    code = child.exitcode if (child.exitcode or 0) >= 0 else 1
    return code or 0, "\n".join(said.read_text().splitlines()[-15:])


def _pytest(tree: Path, tests: tuple[str, ...], said: Path) -> None:
    """In a process of its own: run tests of a copy of the tree, which is found before the installed checkout."""
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree.parent), "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(tree.parent))
    sys.dont_write_bytecode = True
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", MARKS]
    options += [
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]  # plugins that are loaded already
    sys.exit(pytest.main([*options, *tests]))


def judge(tree: Path, mutant: Mutant) -> tuple[str, str]:
    """("killed", "survived" or "unusable", what to say about it)."""
    file = tree / mutant.file
    original = file.read_text()
    try:
        file.write_text(mutant.applied(original))
        code, said = run_tests(tree, mutant.tests)
    except ValueError as error:
        return "unusable", str(error)
    finally:
        file.write_text(original)
    return {0: "survived", 1: "killed"}.get(code, "unusable"), said


def run(mutants: list[Mutant], trees: list[Path]) -> dict[str, str]:
    """What became of each, told as it is known; as many at once as there are copies of the tree."""
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(mutant: Mutant) -> tuple[str, str]:
        tree = free.get()
        try:
            return judge(tree, mutant)
        finally:
            free.put(tree)

    results = {}
    with ThreadPoolExecutor(len(trees)) as pool:
        for mutant, (verdict, said) in zip(mutants, pool.map(one, mutants), strict=True):
            results[mutant.name] = verdict
            print(f"{verdict:<9} {mutant.name:<44} {mutant.file}", flush=True)
            if verdict == "unusable":
                print(said, flush=True)
    return results


def pass_unchanged(tree: Path, mutants: list[Mutant]) -> bool:
    """Whether the tests pass without any change: else a failure would say nothing."""
    tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    code, said = run_tests(tree, tests, BASELINE_TIMEOUT)
    if code:
        print(f"the tests fail without any change:\n{said}")
    return code == 0


def complaints(results: dict[str, str], known: set[str], all_names: set[str]) -> list[str]:
    """What is wrong with a run, a line each."""
    lines = [f"survivors.txt names {name}, which is no mutant" for name in known - all_names]
    for name, verdict in results.items():
        if verdict == "unusable":
            lines.append(f"{name} cannot be used (above)")
        elif verdict == "survived" and name not in known:
            lines.append(f"{name} survived: its tests see nothing")
        elif verdict == "killed" and name in known:
            lines.append(f"{name} dies now: remove it from survivors.txt")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutants of the product's numbers, and who dies.")
    parser.add_argument("only", nargs="*", help="words; mutants whose name or file has one")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    arguments = parser.parse_args()
    everything = load()
    mutants = [
        m
        for m in everything
        if not arguments.only or any(w in f"{m.name} {m.file}" for w in arguments.only)
    ]
    with tempfile.TemporaryDirectory(prefix="nibble-mutants-") as folder:
        trees = [copy_tree(Path(folder) / str(job)) for job in range(arguments.jobs)]
        if not pass_unchanged(trees[0], mutants):
            return 1
        results = run(mutants, trees)
    wrong = complaints(results, survivors(), {m.name for m in everything})
    print(dict(Counter(results.values())), *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
