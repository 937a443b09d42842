"""The files beside the weights that a model needs to talk: tokenizer, chat template, generation defaults."""

import shutil
from pathlib import Path

from ..formats.gguf.side_files import write_side_files
from .base import Checkpoint
from .gguf import GgufCheckpoint

_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_PATTERNS = ("LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")


def copy_side_files(checkpoint: Checkpoint, out_dir: Path) -> list[str]:
    """Bring tokenizer, chat templates, generation config and licence to out_dir; returns the names written.

    From a folder they are copied byte for byte; from a GGUF file they are made from its metadata.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, GgufCheckpoint):
        return write_side_files(checkpoint.file, out_dir)
    folder = checkpoint.path
    found = sorted(
        str(file.relative_to(folder)) for pattern in _PATTERNS for file in folder.glob(pattern)
    )
    names = [name for name in (*_SIDE_FILES, *found) if (folder / name).is_file()]
    for name in names:
        (out_dir / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out_dir / name)
    return names
