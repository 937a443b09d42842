"""A model on disk: opened, read tensor by tensor, and written.

`open_checkpoint` checks every header (seconds at most, whatever the size).
"""

from pathlib import Path

from ...errors import CheckpointError
from ..formats.gguf.container import SPLIT_NAME, is_split
from .base import Checkpoint
from .bitsandbytes import BitsAndBytesCheckpoint
from .folder import FolderCheckpoint
from .gguf import GgufCheckpoint
from .headers import read_json
from .hub import download

__all__ = [
    "BitsAndBytesCheckpoint",
    "Checkpoint",
    "FolderCheckpoint",
    "GgufCheckpoint",
    "open_checkpoint",
]


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local HF folder, a .gguf file, a folder with exactly one .gguf file, or a Hub id (downloaded).

    Raises CheckpointError for anything damaged or missing, UnsupportedError for what Nibble does not read.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = download(str(path_or_id), revision)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            if (split := SPLIT_NAME.fullmatch(path.name)) and int(split[2]) > 1:
                path = path.with_name(
                    f"{split[1]}-00001-of-{split[3]}.gguf"
                )  # any part names the model
            return GgufCheckpoint(path)
        raise CheckpointError(
            "is neither a folder nor a .gguf file", file=path, fix="give the folder that holds it"
        )
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files and not any(path.glob("*.safetensors")):
        if len(gguf_files) > 1 and not is_split(gguf_files):
            raise CheckpointError(
                f"holds {len(gguf_files)} .gguf files", file=path, fix="name one of them"
            )
        return GgufCheckpoint(gguf_files[0])
    return (BitsAndBytesCheckpoint if _is_bitsandbytes(path / "config.json") else FolderCheckpoint)(
        path
    )


def _is_bitsandbytes(config: Path) -> bool:
    found = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == "bitsandbytes"
