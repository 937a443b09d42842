"""Safetensors written part by part: nothing half-written ever looks finished, and a killed run can go on.

    add(tensors)  -> part-00000.safetensors, part-00001...       each whole on disk before `add` returns
    finish()      -> model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json

Invariant: a file under its final name is complete (written as .tmp, synced, renamed), and the bytes that `finish`
writes depend only on the tensors and their order, not on how often the run was interrupted. Parts are joined by copying
byte ranges, so memory never holds more than one part. Tensors lie in a shard by falling item size, then by name, which
keeps each aligned.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import Checkpoint
from .safetensors_files import DTYPES, read_raw_header
from .side_files import copy_side_files

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor's bytes inside a part."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    nbytes: int


class ShardWriter:
    """Writes the weights of one checkpoint into out_dir. Parts already there from a killed run are kept."""

    def __init__(self, out_dir: Path | str, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.out_dir, self.max_shard_bytes = Path(out_dir), max_shard_bytes
        self.out_dir.mkdir(parents=True, exist_ok=True)

    @property
    def parts(self) -> list[Path]:
        """The parts on disk, in order."""
        return sorted(self.out_dir.glob("part-*.safetensors"))

    def add(self, tensors: dict[str, Tensor]) -> Path:
        """Write the tensors as the next part; they are safe on disk when this returns."""
        path = self.out_dir / f"part-{len(self.parts):05d}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, {"format": "pt"})
        _commit(temporary, path)
        return path

    def finish(self) -> list[Path]:
        """Join the parts into the final shards, write the index where there are several, and remove the parts.

        Killed on the way, the parts left are the first ones (the last is removed first), so a run that adds what
        `parts` lacks and calls `finish` again ends in the same bytes. Needs free disk for the weights once more.
        """
        shards = self._group()
        total = len(shards)
        names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        files = [self.out_dir / name for name in (names if total > 1 else ["model.safetensors"])]
        for file, pieces in zip(files, shards, strict=True):
            _join(pieces, file)
        if total > 1:
            where = {p.name: f.name for f, pieces in zip(files, shards, strict=True) for p in pieces}
            size = sum(p.nbytes for pieces in shards for p in pieces)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            write_json(self.out_dir / "model.safetensors.index.json", index)
        for part in reversed(self.parts):
            part.unlink()
        return files

    def _group(self) -> list[list[_Piece]]:
        """Tensors in part order, cut into shards of at most max_shard_bytes (one larger tensor: a shard of its own)."""
        shards: list[list[_Piece]] = [[]]
        size = 0
        for piece in (piece for part in self.parts for piece in _pieces(part)):
            if shards[-1] and size + piece.nbytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece.nbytes
        return [sorted(pieces, key=lambda p: (-DTYPES[p.dtype].itemsize, p.name)) for pieces in shards]


def _pieces(part: Path) -> list[_Piece]:
    header, data_start = read_raw_header(part)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [_Piece(name, e["dtype"], e["shape"], part, data_start + e["data_offsets"][0],
                   e["data_offsets"][1] - e["data_offsets"][0]) for name, e in entries]


def _join(pieces: list[_Piece], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.nbytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for piece in pieces:
            with piece.file.open("rb") as source:
                source.seek(piece.start)
                _copy(source, out, piece.nbytes)
    _commit(temporary, path)


def _copy(source: Any, out: Any, n: int) -> None:
    while n:
        chunk = source.read(min(n, 1 << 24))
        out.write(chunk)
        n -= len(chunk)


def _commit(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable under its final name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON side file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content, encoding="utf-8")
    _commit(temporary, path)


def dequantize_checkpoint(checkpoint: Checkpoint, out_dir: Path | str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write any checkpoint as a plain HF folder in dtype (16 or 32 bit floats), which every other tool reads."""
    writer = ShardWriter(out_dir)
    for leftover in writer.parts:
        leftover.unlink()
    modules = checkpoint.modules()
    consumed = {name for module in modules for name in checkpoint.weight_names(module)}
    parts: dict[str, list[str]] = {}
    for name in sorted({f"{module}.weight" for module in modules} | (checkpoint.names() - consumed)):
        parts.setdefault(_block_of(name), []).append(name)
    for names in parts.values():
        writer.add({name: _dense(checkpoint, name, modules, dtype) for name in names})
    writer.finish()
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "compression_config")}
    config.pop("torch_dtype", None)
    copy_side_files(checkpoint, Path(out_dir))
    write_json(Path(out_dir) / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def _dense(checkpoint: Checkpoint, name: str, modules: set[str], dtype: torch.dtype) -> Tensor:
    module = name.removesuffix(".weight")
    if module != name and module in modules:
        return checkpoint.dense(module, dtype)
    tensor = checkpoint.tensor(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _block_of(name: str) -> str:
    """The first numbered prefix of a tensor name ("model.layers.7"), or "" for what lies outside the blocks."""
    parts = name.split(".")
    cut = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: cut + 1])
