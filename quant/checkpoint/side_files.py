"""The files beside the weights that a model needs to talk: tokenizer, chat template, generation defaults."""

import json
import shutil
from pathlib import Path

from ..formats.gguf import tokenizer as gguf_tokenizer
from ..formats.gguf.container import GgufFile
from .base import Checkpoint
from .gguf import GgufCheckpoint

_SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def copy_side_files(checkpoint: Checkpoint, out_dir: Path) -> list[str]:
    """Bring tokenizer, chat template, generation config and licence to out_dir; returns the names written.

    From a folder they are copied byte for byte; from a GGUF file they are made from its metadata.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, GgufCheckpoint):
        return write_gguf_side_files(
            checkpoint.file, checkpoint.config.get("eos_token_id"), out_dir
        )
    licences = sorted(
        f.name for pattern in ("LICENSE*", "NOTICE*") for f in checkpoint.path.glob(pattern)
    )
    names = [name for name in (*_SIDE_FILES, *licences) if (checkpoint.path / name).is_file()]
    for name in names:
        shutil.copyfile(checkpoint.path / name, out_dir / name)
    return names


def write_gguf_side_files(file: GgufFile, eos: int | list[int] | None, out_dir: Path) -> list[str]:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a GGUF file."""
    gguf_tokenizer.build_tokenizer(file).save(str(out_dir / "tokenizer.json"))
    meta = file.metadata
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    _write_json(out_dir / "tokenizer_config.json", gguf_tokenizer.tokenizer_config(file))
    _write_json(
        out_dir / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    if template := meta.get("tokenizer.chat_template"):
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
        names.append("chat_template.jinja")
    return names


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
