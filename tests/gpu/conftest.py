"""Tests that need an NVIDIA GPU: `make test-gpu`. Elsewhere they skip, and say why."""

import os
import sys
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "kernels"), str(_TESTS.parent / "bench")]  # kernel_cases, random_llama

if not torch.cuda.is_available():
    WHY_NOT = "torch sees no CUDA device"
elif os.environ.get("TRITON_INTERPRET") == "1":
    WHY_NOT = "Triton's interpreter is on; `make test-gpu` turns it off"
else:
    WHY_NOT = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder is marked, and skipped where it cannot run."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if WHY_NOT:
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))
