"""A model on disk: opened, read tensor by tensor, and written.

`open_checkpoint` checks every header (seconds at most, whatever the size).
"""

from pathlib import Path

from ..locate import locate
from .base import Checkpoint
from .bitsandbytes import BitsAndBytesCheckpoint
from .folder import FolderCheckpoint
from .gguf import GgufCheckpoint
from .headers import read_json

__all__ = [
    "BitsAndBytesCheckpoint",
    "Checkpoint",
    "FolderCheckpoint",
    "GgufCheckpoint",
    "open_checkpoint",
]


def open_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Open what `locate` finds: a local HF folder, a GGUF file or a folder with one, or a Hub id (downloaded).

    Raises CheckpointError for anything damaged or missing, UnsupportedError for what Nibble does not read.
    """
    path = locate(path_or_id, revision)
    if path.is_file():
        return GgufCheckpoint(path)
    return (BitsAndBytesCheckpoint if _is_bitsandbytes(path / "config.json") else FolderCheckpoint)(
        path
    )


def _is_bitsandbytes(config: Path) -> bool:
    found = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == "bitsandbytes"
