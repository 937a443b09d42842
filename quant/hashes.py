"""Hashes of a checkpoint's files: a conversion writes them, the Hub knows those of downloads; compared on demand.

    SHA256SUMS      "<64 hex digits>  <name>" a line, as `sha256sum -c SHA256SUMS` reads it too
    Hub's cache     snapshots/REVISION/NAME -> blobs/HASH: the SHA-256 of a large file, git's SHA-1 of a small one
    Hub's folder    .cache/huggingface/download/NAME.metadata: that hash in the second line

Invariant: every file of the folder when it was written is listed. What is written or edited afterwards (the card) is
not, so that it may change. No torch.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError
from .hub import LOADED_FILES

SUMS = "SHA256SUMS"
_CARD = ("README.md", "nibble_quality.json")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path, known: Mapping[Path, str]) -> str:
    """The content of SHA256SUMS for the files that are in a folder now. known: of files that were hashed as written."""
    return "".join(
        f"{known.get(file) or file_sha256(file)}  {file.relative_to(folder).as_posix()}\n"
        for file in _files(folder)
        if not _is_left_out(file)
    )


def problems(folder: Path) -> list[str]:
    """What is not as it was written or as the Hub has it: a line for each file. CheckpointError without any hash."""
    listed = _listed(folder)
    from_hub = {file: digest for file in _files(folder) if (digest := _hub_hash(file, folder))}
    if not listed and not from_hub:
        raise CheckpointError(
            f"has no {SUMS}, and did not come from the Hub: there is nothing to compare with",
            file=folder,
            fix="convert it with Nibble, or download it from the Hub",
        )
    found: list[str] = []
    for name, digest in listed.items():
        if not (folder / name).is_file():
            found.append(f"{folder / name}: is missing")
        elif (now := file_sha256(folder / name)) != digest:
            found.append(f"{folder / name}: has SHA-256 {now[:16]}..., {SUMS} {digest[:16]}...")
    for file, digest in from_hub.items():
        if (now := _hash_like(digest, file)) != digest:
            found.append(f"{file}: has hash {now[:16]}..., the Hub's is {digest[:16]}...")
    if listed:
        found += [
            f"{file}: is not in {SUMS}, and would be loaded"
            for file in _files(folder)
            if file.relative_to(folder).as_posix() not in listed and _would_be_loaded(file, folder)
        ]
    return found


def _listed(folder: Path) -> dict[str, str]:
    """Name -> SHA-256, of SHA256SUMS; nothing where there is none. CheckpointError if it is no such file."""
    file = folder / SUMS
    if not file.is_file():
        return {}
    listed = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match[2].startswith("/") or ".." in match[2].split("/"):
            raise CheckpointError(
                f"has a line that is no hash of a file beside it: {line[:80]!r}", file=file
            )
        listed[match[2]] = match[1]
    if not listed:
        raise CheckpointError("lists no file", file=file, fix="download it again")
    return listed


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in sorted(folder.rglob("*")) if f.is_file() and not _is_hidden(f, folder))


def _is_left_out(file: Path) -> bool:
    return file.name in (*_CARD, SUMS) or file.suffix == ".tmp"  # which the writer leaves if killed


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _would_be_loaded(file: Path, folder: Path) -> bool:
    name = file.relative_to(folder).as_posix()
    return not _is_left_out(file) and any(fnmatch(name, pattern) for pattern in LOADED_FILES)


def _hub_hash(file: Path, folder: Path) -> str | None:
    """What the Hub knows a downloaded file by."""
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and _HASH.fullmatch(blob.name):
        return blob.name
    name = f"{file.relative_to(folder).as_posix()}.metadata"
    metadata = folder / ".cache" / "huggingface" / "download" / name
    lines = metadata.read_text(errors="replace").splitlines() if metadata.is_file() else []
    return lines[1] if len(lines) > 1 and _HASH.fullmatch(lines[1]) else None


def _hash_like(known: str, file: Path) -> str:
    """SHA-256 of a file; beside a hash of 40 digits git's SHA-1 of it as a blob."""
    if len(known) == 64:
        return file_sha256(file)
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
