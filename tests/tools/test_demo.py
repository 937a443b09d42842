"""What `make demo` and `make install` say of how to go on."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.tools import demo

ROOT = Path(__file__).parents[2]


def test_the_demo_says_how_to_reach_the_command() -> None:
    said = demo._next_steps(demo.QUANTIZED)
    activate = re.search(r"source (\S+)", said)
    assert activate and (ROOT / activate[1]).parent == Path(sys.executable).parent
    assert f"nibble serve models/{demo.QUANTIZED.name}" in said and "nibble convert" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_install_says_how_to_reach_the_command() -> None:
    done = subprocess.run(
        ["make", "-n", "install"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "source .venv/bin/activate" in done.stdout


def test_the_readme_reaches_the_command_before_it_uses_it() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("source .venv/bin/activate") < text.index("\nnibble ")
