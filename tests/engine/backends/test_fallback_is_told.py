"""Whoever is served by torch's operators, which are slow, is told so once, and why."""

import logging
from pathlib import Path

import pytest

from nibble.engine.config import EngineConfig
from nibble.engine.runner import Runner
from nibble.kernels.cpu import library

from .. import models

needs_library = pytest.mark.skipif(
    library.why_missing() is not None, reason=str(library.why_missing())
)


def told(caplog: pytest.LogCaptureFixture, folder: Path, **flags) -> list[logging.LogRecord]:
    """What loading the model said about the backend that serves it."""
    with caplog.at_level(logging.INFO, "nibble"):
        Runner(
            EngineConfig(model=str(folder), kv_cache_memory=1 << 22, prepared_cache=None, **flags)
        )
    return [r for r in caplog.records if "torch" in r.getMessage() and r.levelno >= logging.INFO]


@needs_library
def test_a_model_that_the_fast_backend_refuses(caplog, tmp_path) -> None:
    models.build("qwen3", tmp_path, head_dim=24)
    [record] = told(caplog, tmp_path, dtype="bfloat16")
    assert "24" in record.getMessage()  # dimensions a head, which is the reason


def test_a_machine_without_the_library_is_warned(caplog, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(library, "why_missing", lambda: "the C++ kernels are not built")
    models.build("llama", tmp_path)
    [record] = told(caplog, tmp_path, dtype="bfloat16")
    assert record.levelno == logging.WARNING
    assert "the C++ kernels are not built" in record.getMessage()


@needs_library
def test_a_model_that_the_fast_backend_serves_needs_no_word(caplog, tmp_path) -> None:
    models.build("llama", tmp_path)
    assert not told(caplog, tmp_path, dtype="bfloat16")
