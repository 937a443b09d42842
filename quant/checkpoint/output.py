"""Where a conversion writes: OUT appears whole or not at all.

    OUT.partial   everything is written here, config.json last
    OUT           by one rename, when all of it is durable

Invariant: what stood at OUT before is removed only after its successor is complete. A run that dies leaves OUT.partial,
which `--resume` completes.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError, UserError
from .base import Checkpoint
from .journal import begun, lock
from .writer import WORK, sync_folder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, checkpoint: Checkpoint, overwrite: bool, resume: bool) -> None:
    """Raise CheckpointError where writing to `output` would lose something or cannot work."""
    if output.exists() and output.resolve() == checkpoint.path.resolve():
        raise CheckpointError("is the model itself", file=output, fix="give another output folder")
    if output.is_file():
        raise CheckpointError("is a file", file=output, fix="give a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            "exists and is not empty", file=output, fix="give another folder, or --overwrite"
        )
    if (done := begun(partial_of(output))) and not (overwrite or resume):
        raise CheckpointError(
            f"holds a conversion that was interrupted after {done} parts",
            file=partial_of(output),
            fix="--resume to go on, --overwrite to start again",
        )


def unpublish(output: Path) -> None:
    """Make OUT.partial again of an OUT whose run died between the rename and its last clean-up."""
    if begun(output) and not partial_of(output).exists():
        output.rename(partial_of(output))


def check_disk(output: Path, needed: int) -> None:
    """Raise UserError unless the disk that `output` is on has `needed` bytes, counting what is in OUT.partial."""
    partial = partial_of(output)
    there = (
        sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) if partial.exists() else 0
    )
    free = free_bytes(output)
    if needed - there > free:
        raise UserError(
            f"{output}: needs {gigabytes(needed - there)} of disk, {gigabytes(free)} are free (free "
            "some, or give a folder on another disk)"
        )


@contextmanager
def writing(output: Path, needed: int, resume: bool) -> Iterator[Path]:
    """OUT.partial, kept to oneself, emptied unless resuming; published as OUT when the block ends without an error.

    Raises UserError with needed and free bytes where the disk is full. A run that fails before any part is done
    leaves nothing.
    """
    partial = partial_of(output)
    try:
        (partial / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot be made: {error.strerror}",
            file=partial,
            fix="give an output folder where you may write",
        ) from None
    with lock(partial):
        if not resume:
            _empty(partial)
        try:
            yield partial
            _publish(partial, output)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"{output}: the disk is full: the conversion needs {gigabytes(needed)} in all, "
                f"{gigabytes(free_bytes(output))} are free (free some and give --resume)"
            ) from error
        finally:
            if partial.exists() and not begun(partial):
                shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(output / WORK, ignore_errors=True)


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def free_bytes(path: Path) -> int:
    """On the disk that a path is or will be on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB ({number} bytes)"


def _empty(partial: Path) -> None:
    for child in partial.iterdir():
        if child.name != WORK:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    for child in (partial / WORK).iterdir():
        if child.name != "lock":
            child.unlink()


def _publish(partial: Path, output: Path) -> None:
    if output.exists():
        replaced = output.with_name(output.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(output)
    sync_folder(output.parent)
