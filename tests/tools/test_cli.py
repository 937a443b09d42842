"""The `nibble` command as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nibble import cli
from nibble.cli import VERBS, _load, main, parse_bytes
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


def test_help_names_every_verb() -> None:
    done = nibble("--help")
    assert done.returncode == 0 and all(f" {verb} " in done.stdout for verb in VERBS)
    assert nibble().stdout == nibble("-h").stdout == nibble("help").stdout == done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_flag_and_every_default(verb: str) -> None:
    """At 80 columns, where Rich cuts what does not fit and takes [brackets] in a help text for markup."""
    shown = nibble("help", verb, COLUMNS="80").stdout
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.replace("│", " ").split())
    for parameter in _load(verb).params:
        assert all(
            f" {flag} " in words for flag in (*parameter.opts, *parameter.secondary_opts)
        ) or (parameter.param_type_name == "argument" and parameter.metavar in words)
        default = parameter.show_default if parameter.default is None else parameter.default
        if isinstance(default, str):
            assert f"[default: ({default})]" in words or f"[default: {default}]" in words
        elif default is not None and not isinstance(default, bool):
            assert f"[default: {default}]" in words
        help_text = parameter.help or ""
        assert "[default" not in help_text, "Rich would leave it out: say it with show_default"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    code = (
        f"import sys; from nibble.cli import main; main(['help', {verb!r}])\n"
        "print({'torch', 'transformers', 'fastapi'} & set(sys.modules))"
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


def test_operations_page_has_every_verb_flag_and_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "OPERATIONS.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for verb in VERBS:
        assert any(row.startswith(f"| `nibble {verb}") for row in rows), f"no row for nibble {verb}"
    for parameter in _load("serve").params:
        if parameter.param_type_name == "argument" or parameter.name == "help":
            continue
        row = next((row for row in rows if f"`{parameter.opts[0]}`" in row.split("|")[1]), None)
        assert row, f"no row for {parameter.opts[0]}"
        default = parameter.default
        if default is not None and not isinstance(default, bool):
            text = f"{default:g}" if isinstance(default, float) else str(default)
            assert text in row.split("|")[2], f"{parameter.opts[0]}: its default is {text}"


def test_shells_complete_verbs_and_flags() -> None:
    def complete(line: str) -> list[str]:
        shell = {"_NIBBLE_COMPLETE": "complete_bash", "COMP_WORDS": line}
        return nibble(**shell, COMP_CWORD=str(line.count(" "))).stdout.split()

    assert complete("nibble ") == list(VERBS)
    assert "--max-num-batched-tokens" in complete("nibble serve --max")


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
    assert nibble("--version").stdout == nibble("-V").stdout == done.stdout


def test_unknown_verb() -> None:
    done = nibble("sevre")
    assert done.returncode == 2 and "Did you mean 'serve'" in done.stderr


@pytest.mark.parametrize(
    "args", [("serve",), ("serve", "x", "--no-such-option"), ("serve", "x", "--port", "99999")]
)
def test_bad_usage_is_one_line(args: tuple[str, ...]) -> None:
    done = nibble(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "nibble serve" in done.stderr


def test_what_a_verb_raises_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb_that_raises(error: type[BaseException]) -> None:
        def verb() -> None:
            raise error

        monkeypatch.setattr(cli, "version", verb)

    verb_that_raises(ValueError)
    with pytest.raises(ValueError):
        main(["version"])
    verb_that_raises(EOFError)
    with pytest.raises(RuntimeError):  # typer's Abort, out of the EOFError
        main(["version"])
    verb_that_raises(KeyboardInterrupt)
    assert main(["version"]) == 130


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
        ("1TB", 10**12),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "2PiB", "1e9", "2 G i B"])
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
    for url in ("http://127.0.0.1:9", "127.0.0.1:9", "127.0.0.1:9/v1/"):
        done = nibble("chat", "--url", url, "--prompt", "x")
        assert done.returncode == 2 and "nibble serve" in done.stderr
        assert "no server answers at http://127.0.0.1:9 " in done.stderr
