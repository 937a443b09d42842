"""Flags of other servers as ours, and the page that lists them."""

import re
from pathlib import Path

import pytest

from nibble.cli import main
from nibble.errors import UserError
from nibble.tools import peer_flags
from nibble.tools.peer_flags import translated


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["--model-id", "org/name", "--hostname=0.0.0.0"], ["org/name", "--host", "0.0.0.0"]),
        (["-m", "x.gguf", "-c", "4096", "-np", "8"],
         ["x.gguf", "--max-model-len", "4096", "--max-num-seqs", "8"]),
        (["x", "--enable-prefix-caching", "--no-webui"], ["x", "--no-ui"]),
        (["x", "-tp", "1", "--sharded=false", "-q", "awq"], ["x"]),
        (["x", "--port", "8", "--api-key=--model"], ["x", "--port", "8", "--api-key=--model"]),
    ],
)  # fmt: skip
def test_peers_flags_become_ours(given: list[str], ours: list[str]) -> None:
    assert translated(given) == ours


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["x", "--tensor-parallel-size", "2"], "there is 1 alone"),
        (["x", "--gpu-memory-utilization=0.9"], "--kv-cache-memory"),
        (["x", "--enable-lora"], "adapters"),
        (["--model"], "lacks its value"),
    ],
)
def test_what_there_is_not_is_refused_in_words(given: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        translated(given)


def test_the_command_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-id", "/nowhere/at/all", "--num-shard", "1"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
    assert main(["serve", "x", "--enable-lora"]) == 2
    assert "adapters are not supported" in capsys.readouterr().err


def test_the_page_has_every_flag_that_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs" / "FLAGS.md").read_text()
    named = set(re.findall(r"`(--?[\w-]+)`", page))
    for table in ("RENAMED", "SWITCHES", "ALREADY_SO", "ALREADY_SO_WITH_VALUE", "ONLY", "REFUSED"):
        missing = set(getattr(peer_flags, table)) - named
        assert not missing, table
