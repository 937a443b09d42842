"""One file of the prepared cache: groups of linears in the C++ kernels' layout, and what tells that they are whole.

    NAME.safetensors    tensors  <group>.<i>.<field>, of each linear what it has of _TENSORS
                        header   "nibble_prepared": a Manifest in JSON; "crc32": of that text

Invariant: `read` gives what `write` was given, or raises. Every byte that it hands on is under a CRC-32, that of a
tensor or that of the manifest; the header's own dtypes and shapes are left to the kernels' check of what they are
given. A CRC finds damage, not malice: who else may write here is the cache's business.
"""

import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ....errors import CheckpointError
from ....kernels.cpu.prepared import Prepared
from ....quant.checkpoint.headers import read_metadata
from ....quant.checkpoint.writer import save_tensors

_MARK, _CRC = "nibble_prepared", "crc32"
_TENSORS = ("data", "scales", "offsets", "bias", "perm", "table")

_Int32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Groups = dict[str, list[Prepared]]


class DamagedEntry(Exception):
    """The file is not what was written: the message says how."""


class _Linear(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The numbers of a Prepared, and the CRC-32 of each tensor that it has."""

    format: _Int32
    n: _Int32
    k: _Int32
    group: _Int32
    offset: _Int32
    midpoint: _Int32
    multiplier: float
    tensors: dict[str, int]


class Manifest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is in a file, and of what."""

    name: str  # the file's own, which says of which state of which checkpoint it is
    source: str  # the checkpoint's path, so that the entry of one that is gone can be removed
    groups: dict[str, list[_Linear]]


_NUMBERS = tuple(name for name in _Linear.__struct_fields__ if name != "tensors")


def write(file: Path, name: str, source: str, groups: Groups) -> None:
    """Durable under `file` when this returns. name: what the file will be called in the end. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    records: dict[str, list[_Linear]] = {}
    for group, linears in groups.items():
        records[group] = []
        for i, linear in enumerate(linears):
            own = {key: t for key in _TENSORS if (t := getattr(linear, key)) is not None}
            tensors |= {f"{group}.{i}.{key}": tensor for key, tensor in own.items()}
            numbers: dict[str, Any] = {key: getattr(linear, key) for key in _NUMBERS}
            checksums = {key: _crc32(tensor) for key, tensor in own.items()}
            records[group].append(_Linear(**numbers, tensors=checksums))
    manifest = msgspec.json.encode(Manifest(name=name, source=source, groups=records))
    save_tensors(file, tensors, {_MARK: manifest.decode(), _CRC: str(zlib.crc32(manifest))})


def read(file: Path) -> Groups:
    """The groups of a file, their tensors in mapped memory. Raises DamagedEntry; FileNotFoundError; OSError."""
    try:
        with safe_open(file, framework="pt") as stored:
            manifest = _manifest(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise DamagedEntry(str(error)) from None
    if manifest.name != file.name:
        raise DamagedEntry(f"it was written as {manifest.name}")
    checksums = {
        f"{group}.{i}.{key}": checksum
        for group, linears in manifest.groups.items()
        for i, linear in enumerate(linears)
        for key, checksum in linear.tensors.items()
    }
    if checksums.keys() != tensors.keys():
        other = min(checksums.keys() ^ tensors.keys())
        raise DamagedEntry(f"tensor {other} is {'missing' if other in checksums else 'foreign'}")
    # in one thread: the pages of a mapped file come no faster to several
    for name, tensor in tensors.items():
        if _crc32(tensor) != checksums[name]:
            raise DamagedEntry(f"tensor {name} has changed")
    return {
        group: [_prepared(linear, f"{group}.{i}.", tensors) for i, linear in enumerate(linears)]
        for group, linears in manifest.groups.items()
    }


def source_of(file: Path) -> Path | None:
    """The checkpoint that a file was made of; None for a file that does not say that the prepared cache wrote it."""
    try:
        return Path(_manifest(read_metadata(file)).source)
    except (DamagedEntry, CheckpointError, OSError):
        return None


def _manifest(metadata: dict[str, str]) -> Manifest:
    text = str(metadata.get(_MARK, "")).encode(errors="replace")
    if str(metadata.get(_CRC)) != str(zlib.crc32(text)):
        raise DamagedEntry("its list of contents has changed, or there is none")
    try:
        return msgspec.json.decode(text, type=Manifest)
    except msgspec.MsgspecError as error:
        raise DamagedEntry(f"its list of contents: {error}") from None


def _prepared(linear: _Linear, prefix: str, tensors: dict[str, Tensor]) -> Prepared:
    if not {"data"} <= linear.tensors.keys() <= set(_TENSORS):
        raise DamagedEntry(f"{prefix[:-1]} has the tensors {', '.join(linear.tensors) or 'none'}")
    numbers: dict[str, Any] = {key: getattr(linear, key) for key in _NUMBERS}
    return Prepared(**numbers | {key: tensors[prefix + key] for key in linear.tensors})


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
