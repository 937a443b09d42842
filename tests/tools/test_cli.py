"""The `nibble` command as a user types it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nibble.cli import VERBS, parse_bytes
from nibble.errors import UserError


def nibble(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nibble", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def test_help_is_quick_and_names_every_verb() -> None:
    nibble("--help")  # writes the bytecode
    start = time.monotonic()
    done = nibble("--help")
    seconds = time.monotonic() - start
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)
    assert seconds < 2  # 0.2 s on a quiet machine


def test_help_imports_neither_torch_nor_the_server() -> None:
    code = (
        "import sys; from nibble.cli import main; main([])\n"
        "print({'torch', 'fastapi', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_serving_imports_no_torch() -> None:
    code = (
        "import sys, nibble.server.lifecycle, nibble.server.app, nibble.engine.client\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_version() -> None:
    done = nibble("version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "nibble")
    assert nibble("--version").stdout == done.stdout


def test_unknown_verb() -> None:
    done = nibble("sevre")
    assert done.returncode == 2 and "did you mean 'serve'" in done.stderr


@pytest.mark.parametrize(
    "args", [("serve",), ("serve", "x", "--no-such-option"), ("serve", "x", "--port", "99999")]
)
def test_bad_usage(args: tuple[str, ...]) -> None:
    assert nibble(*args).returncode == 2


def test_bad_input_is_one_line_and_debug_shows_more(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    done = nibble("serve", missing, "--port", "0", HF_HUB_OFFLINE="1")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert done.stderr.startswith("error: ") and "no-such-model" in done.stderr
    assert (
        "Traceback" in nibble("serve", missing, "--port", "0", "--debug", HF_HUB_OFFLINE="1").stderr
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512M", 512_000_000),
        ("1.5gi", 3 * 2**29),
        ("7", 7),
        ("64 MiB", 64 * 2**20),
        ("10kB", 10_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "2TiB", "1e9", "2 G i B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_bytes(text)


def test_bad_size_is_bad_input() -> None:
    assert nibble("serve", "x", "--kv-cache-memory", "lots").returncode == 2


def test_chat_with_a_model(tiny_llama: Path) -> None:
    done = nibble(
        "chat", str(tiny_llama), "--prompt", "Hello", "--max-tokens", "8", "--temperature", "0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and "[8 tokens," in done.stderr
    turns = nibble("chat", str(tiny_llama), "--max-tokens", "4", stdin="one\n/clear\ntwo\n/exit\n")
    assert turns.stderr.count("[4 tokens,") == 2


def test_chat_without_a_server() -> None:
    done = nibble("chat", "--url", "http://127.0.0.1:9", "--prompt", "x")
    assert done.returncode == 2 and "nibble serve" in done.stderr and "Traceback" not in done.stderr
