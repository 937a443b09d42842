"""Safetensors written part by part: nothing half-written ever looks finished, and a killed run can go on.

    add(tensors)  -> .work/part-00000.safetensors, ...   each whole on disk, and its SHA-256 known, before `add` returns
    finish()      -> model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    clean()       removes .work, which is also where a journal of the run may live

Invariant: a file under its final name is complete (written as .tmp, synced, renamed), and the bytes that `finish`
writes depend only on the tensors and their order, not on how often the run was interrupted. `finish` first writes down
which part's bytes go where (.work/layout.json), joins one shard after the other by copying byte ranges, and removes a
part once every byte of it is in a finished shard: memory never holds more than a chunk, and the disk never more than
the weights and one shard. Tensors lie in a shard by falling item size, then by name, which keeps each aligned.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architectures.multimodal import is_multimodal
from ...errors import CheckpointError
from ..hashes import SUMS, file_sha256, sums
from .base import Checkpoint
from .headers import DTYPES, read_json, read_raw_header
from .side_files import copy_side_files

MAX_SHARD_BYTES = 5_000_000_000
WORK = ".work"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24


class ShardWriter:
    """Writes the weights of one checkpoint into out_dir. Parts already there from a killed run are kept."""

    def __init__(self, out_dir: Path | str, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.out_dir, self.max_shard_bytes = Path(out_dir), max_shard_bytes
        self.work = self.out_dir / WORK
        self.work.mkdir(parents=True, exist_ok=True)
        self._layout_file = self.work / "layout.json"

    @property
    def parts(self) -> list[Path]:
        """The parts on disk, in order."""
        return sorted(self.work.glob("part-*.safetensors"))

    def add(self, tensors: dict[str, Tensor]) -> tuple[Path, str]:
        """Write the tensors as the next part, safe on disk when this returns: (its path, its SHA-256)."""
        path = self.work / f"part-{len(self.parts):05d}.safetensors"
        return path, save_tensors(path, tensors)

    def finish(self) -> dict[Path, str]:
        """Join the parts into the final shards, the SHA-256 of each returned, and write the index where there are
        several.

        Killed on the way, it can be called again: shards that were done are not joined twice. Raises OSError where the
        disk is full. Needs free disk for one shard beside the parts.
        """
        if not self._layout_file.exists():
            write_checked_json(self._layout_file, self._plan_shards())
        layout = read_checked_json(self._layout_file)
        last_use = {
            piece["part"]: i
            for i, shard in enumerate(layout["shards"])
            for piece in shard["pieces"]
        }
        files = [self.out_dir / shard["name"] for shard in layout["shards"]]
        digests = {}
        for i, (file, shard) in enumerate(zip(files, layout["shards"], strict=True)):
            digests[file] = (
                file_sha256(file) if file.exists() else _join(self.work, shard["pieces"], file)
            )
            for part in [part for part, last in last_use.items() if last <= i]:
                (self.work / part).unlink(missing_ok=True)
        if len(files) > 1:
            write_json(self.out_dir / "model.safetensors.index.json", layout["index"])
        return digests

    def clean(self) -> None:
        """Remove what only a killed run would need."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _plan_shards(self) -> dict[str, Any]:
        shards = self._group()
        total = len(shards)
        names = (
            [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
            if total > 1
            else ["model.safetensors"]
        )
        where = {
            p["name"]: name for name, pieces in zip(names, shards, strict=True) for p in pieces
        }
        size = sum(p["nbytes"] for pieces in shards for p in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        return {
            "shards": [{"name": n, "pieces": p} for n, p in zip(names, shards, strict=True)],
            "index": index,
        }

    def _group(self) -> list[list[dict[str, Any]]]:
        """Tensors in part order, cut into shards of at most max_shard_bytes (one larger tensor: a shard of its own)."""
        shards: list[list[dict[str, Any]]] = [[]]
        size = 0
        for piece in (piece for part in self.parts for piece in _pieces(part)):
            if shards[-1] and size + piece["nbytes"] > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(piece)
            size += piece["nbytes"]
        return [
            sorted(pieces, key=lambda p: (-DTYPES[p["dtype"]].itemsize, p["name"]))
            for pieces in shards
        ]


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file durably under its name; returns the SHA-256 of its bytes. Raises OSError.

    metadata: what the header says beside the tensors.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries = [
        (name, _NAMES[t.dtype], list(t.shape), t.numel() * t.element_size()) for name, t in ordered
    ]
    digest = hashlib.sha256()
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        for chunk in _chunks(entries, (t for _, t in ordered), metadata or {}):
            digest.update(chunk)
            out.write(chunk)
    _commit(temporary, path)
    return digest.hexdigest()


def _chunks(
    entries: list[tuple[str, str, list[int], int]],
    tensors: Iterable[Tensor],
    metadata: dict[str, str],
) -> Iterable[Any]:
    yield _header(entries, metadata)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            raw = flat.view(torch.uint8).numpy().data
            yield from (raw[i : i + _CHUNK] for i in range(0, len(raw), _CHUNK))


def _header(
    entries: list[tuple[str, str, list[int], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file with these tensors (name, dtype, shape, bytes), in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offset = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _pieces(part: Path) -> list[dict[str, Any]]:
    header, data_start = read_raw_header(part)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [
        {
            "name": name,
            "dtype": e["dtype"],
            "shape": e["shape"],
            "part": part.name,
            "start": data_start + e["data_offsets"][0],
            "nbytes": e["data_offsets"][1] - e["data_offsets"][0],
        }
        for name, e in entries
    ]


def _join(folder: Path, pieces: list[dict[str, Any]], path: Path) -> str:
    """Returns the SHA-256 of what was written."""
    temporary = path.with_suffix(".tmp")
    header = _header([(p["name"], p["dtype"], p["shape"], p["nbytes"]) for p in pieces])
    digest = hashlib.sha256(header)
    with temporary.open("wb") as out:
        out.write(header)
        for piece in pieces:
            with (folder / piece["part"]).open("rb") as source:
                source.seek(piece["start"])
                left = piece["nbytes"]
                while left:
                    chunk = source.read(min(left, _CHUNK))
                    if not chunk:
                        raise CheckpointError("has become shorter", file=folder / piece["part"])
                    digest.update(chunk)
                    out.write(chunk)
                    left -= len(chunk)
    _commit(temporary, path)
    return digest.hexdigest()


def _commit(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable under its final name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_sums(folder: Path, known: Mapping[Path, str]) -> None:
    """Hash every file that a conversion wrote. known: of files whose hash is known from writing them."""
    write_text(folder / SUMS, sums(folder, known))


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON side file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, with a hash of the content in it: what a later run will act on unseen."""
    write_json(path, content | {"sha256": _content_sha256(content)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """What `write_checked_json` wrote. CheckpointError if it has changed since."""
    content = read_json(path)
    if content.pop("sha256", None) != _content_sha256(content):
        raise CheckpointError("is damaged", file=path, fix="start again with --overwrite")
    return content


def _content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content, encoding="utf-8")
    _commit(temporary, path)


def dequantize_checkpoint(
    checkpoint: Checkpoint, out_dir: Path | str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write any checkpoint as a plain HF folder in dtype (16 or 32 bit floats), which every other tool reads."""
    writer = ShardWriter(out_dir)
    writer.clean()
    writer = ShardWriter(out_dir)
    modules = checkpoint.modules()
    parts: dict[str, list[str]] = {}
    for name in sorted({f"{module}.weight" for module in modules} | checkpoint.loose_names()):
        parts.setdefault(block_of(name), []).append(name)
    for names in parts.values():
        writer.add({name: _dense(checkpoint, name, modules, dtype) for name in names})
    writer.finish()
    copy_side_files(checkpoint, Path(out_dir))
    write_json(Path(out_dir) / "config.json", config_in(dtype, checkpoint))
    writer.clean()


def config_in(dtype: torch.dtype, checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's own config.json for weights in `dtype`, with nothing in it of how it was quantized."""
    dropped = ("quantization_config", "compression_config", "torch_dtype")
    config = {key: value for key, value in checkpoint.config.items() if key not in dropped}
    named = {"dtype": str(dtype).removeprefix("torch.")}
    if is_multimodal(config) and isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text.items() if k not in dropped} | named
    return config | named


def _dense(checkpoint: Checkpoint, name: str, modules: set[str], dtype: torch.dtype) -> Tensor:
    module = name.removesuffix(".weight")
    if module != name and module in modules:
        return checkpoint.dense(module, dtype)
    tensor = checkpoint.tensor(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def block_of(name: str) -> str:
    """The first numbered prefix of a tensor name ("model.layers.7"), or "" for what lies outside the blocks."""
    parts = name.split(".")
    cut = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: cut + 1])
