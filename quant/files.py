"""Files of a checkpoint, read whole: regular ones, and never more of them than is expected. No torch."""

import os
import stat
from pathlib import Path

from ..errors import CheckpointError


def regular_size(file: Path) -> int:
    """Bytes of a file. CheckpointError if there is none, or it is a pipe, a device or a folder: reading these may never
    end."""
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", file=file, fix="download it again"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("is no regular file", file=file, fix="download it again")
    return found.st_size


def check_size(file: Path, limit: int) -> None:
    """CheckpointError unless it is a regular file of at most `limit` bytes."""
    size = regular_size(file)
    if size > limit:
        raise CheckpointError(
            f"has {size} bytes, more than the {limit} that such a file may have",
            file=file,
            fix="download it again",
        )


def read_bounded(file: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. CheckpointError for any other."""
    check_size(file, limit)
    try:
        # not blocking: the file may have become a pipe since
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            return stream.read(limit)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from None


def read_text(file: Path, limit: int) -> str:
    """As read_bounded, decoded. CheckpointError if it is not UTF-8."""
    try:
        return read_bounded(file, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"is not UTF-8 text: {error.reason} at byte {error.start}",
            file=file,
            fix="download it again",
        ) from None
