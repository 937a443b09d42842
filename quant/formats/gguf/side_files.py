"""The files that a folder has beside its weights, made from a GGUF file: tokenizer, chat template, defaults.

No torch: the HTTP server's process makes its tokenizer here.
"""

import json
from pathlib import Path
from typing import Any

from .container import GgufFile
from .model import eos_token_ids
from .tokenizer import build_tokenizer, tokenizer_config


def write_side_files(file: GgufFile, out_dir: Path) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja, as far as the file
    has them; returns their names. Errors: see `tokenizer.build_tokenizer`."""
    build_tokenizer(file).save(str(out_dir / "tokenizer.json"))
    meta = file.metadata
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(file),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    _write_json(out_dir / "tokenizer_config.json", tokenizer_config(file))
    _write_json(
        out_dir / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    if template := meta.get("tokenizer.chat_template"):
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
        names.append("chat_template.jinja")
    return names


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
