"""The safetensors files of a checkpoint folder, checked from their headers alone.

    header length u64 | JSON {name: {dtype, shape, data_offsets}, "__metadata__": {...}} | data

Invariant: once `scan` returns, every tensor it lists lies whole inside its file and has exactly the bytes that its
dtype and shape need. Nothing but headers is read, so a 70B checkpoint takes milliseconds.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...architectures import limits
from ...errors import CheckpointError
from ..files import read_bounded, regular_size

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    # where it is a part of another tensor: that one's name, and the indices along its first axes
    part_of: tuple[str, tuple[int | slice, ...]] | None = None
    transposed: bool = False  # as it lies there


def scan(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the checkpoint in `folder`, by name.

    Raises CheckpointError for a missing or truncated shard, an LFS pointer, a tensor in two shards, or a folder whose
    weights are only in pickle files.
    """
    entries: dict[str, TensorEntry] = {}
    files, index = shard_files(folder)
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(
                    f"is also in {entries[name].file.name}", file=file, tensor=name, fix=_AGAIN
                )
            entries[name] = entry
    for name, file_name in index.items():
        if name not in entries or entries[name].file.name != file_name:
            raise CheckpointError(
                f"does not hold the tensor that {folder.name}'s index places there",
                file=folder / file_name,
                tensor=name,
                fix=_AGAIN,
            )
    return entries


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder and, where there is an index, its map from tensor to file name."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists() or index_file.is_symlink():
        index = read_json(index_file).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise CheckpointError(
                "has no weight_map of tensor to file names", file=index_file, fix=_AGAIN
            )
        for name, file_name in index.items():
            if Path(file_name).name != file_name:
                raise CheckpointError(
                    f"points outside its folder: {file_name!r}",
                    file=index_file,
                    tensor=name,
                    fix="do not use this checkpoint",
                )
            if not (folder / file_name).is_file():
                raise CheckpointError(
                    f"shard is missing; it should hold {name!r}",
                    file=folder / file_name,
                    fix="download it",
                )
        names = sorted(set(index.values()))
        if len(names) > limits.MAX_SHARDS:
            raise CheckpointError(f"names {len(names)} shards", file=index_file, fix=_AGAIN)
        return [folder / name for name in names], index
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], {}
    return _unindexed(folder), {}


def _unindexed(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    numbered = [m for f in found if (m := re.search(r"-(\d+)-of-(\d+)\.safetensors$", f.name))]
    if numbered and len(numbered) == len(found):
        total = int(numbered[0][2])
        if missing := set(range(1, total + 1)) - {int(m[1]) for m in numbered}:
            raise CheckpointError(
                f"shard {min(missing)} of {total} is missing", file=folder, fix="download it"
            )
        return found
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"has {len(found)} safetensors files and no model.safetensors.index.json",
            file=folder,
            fix="download the index, or keep only the model's own file",
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            "has its weights only in pickle files, which can run code and are never opened",
            file=folder,
            fix="use a safetensors version of the model",
        )
    raise CheckpointError(
        "has no .safetensors weights", file=folder, fix="give a checkpoint folder or a .gguf file"
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensor entries of one safetensors file; CheckpointError unless header and file size agree."""
    header, data_start = read_raw_header(file)
    data_size = regular_size(file) - data_start
    if len(header) > limits.MAX_TENSORS:
        raise CheckpointError(
            f"has {len(header)} tensors, more than the {limits.MAX_TENSORS} that a file may have",
            file=file,
        )
    entries = {}
    for name, raw in header.items():
        try:
            dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                "has a damaged header entry", file=file, tensor=name, fix=_AGAIN
            ) from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(
                f"has dtype {dtype}, which is not supported", file=file, tensor=name
            )
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise CheckpointError(
                "has a damaged shape or offset", file=file, tensor=name, fix=_AGAIN
            )
        if end > data_size:
            raise CheckpointError(
                f"file is truncated: the tensor ends at byte {end} of the data, the file has "
                f"{data_size}",
                file=file,
                tensor=name,
                fix=_AGAIN,
            )
        if end - begin != prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"has {end - begin} bytes for shape {list(shape)} of {dtype}",
                file=file,
                tensor=name,
                fix=_AGAIN,
            )
        entries[name] = TensorEntry(file, DTYPES[dtype], shape, end - begin)
    return entries


def read_raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's entries as written, without metadata, and the byte at which the data begins."""
    header, data_start = _read_whole_header(file)
    header.pop("__metadata__", None)
    return header, data_start


def read_metadata(file: Path) -> dict[str, Any]:
    """What the header says beside its tensors, whether or not the data is there; empty where it says nothing."""
    found = _read_whole_header(file)[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def _read_whole_header(file: Path) -> tuple[dict[str, Any], int]:
    size = regular_size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError(
                "is a Git LFS pointer, not the weights", file=file, fix="run `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, limits.MAX_HEADER_BYTES):
            raise CheckpointError(
                f"is truncated, no safetensors file, or has a header of more than {limits.MAX_HEADER_BYTES} bytes",
                file=file,
                fix=_AGAIN,
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError("has a damaged safetensors header", file=file, fix=_AGAIN)
    return header, 8 + length


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a side file; CheckpointError unless it is one."""
    try:
        content = json.loads(read_bounded(file, limits.MAX_JSON_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}".splitlines()[0], file=file, fix=_AGAIN
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError("holds no JSON object", file=file, fix=_AGAIN)
    return content
