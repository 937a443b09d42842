"""Prepared weights on disk: what one start lays out for the C++ kernels, the next one reads.

    DIR/prepared-weights/     made by Nibble, 0700
      CACHEDIR.TAG            says so, to Nibble and to programs that make backups (bford.info/cachedir)
      <checkpoint>-<state>.safetensors    0600; 16 hex digits each: of the checkpoint's path and the options that change
                              what is prepared; of its files as they are and the kernels' layout

Invariants: what is read is what an earlier start of this user wrote, byte for byte, or nothing. What is removed was
made by Nibble: it has the form of such a name, says in its header what it is, and lies in a folder that Nibble made.
Whatever is wrong with the cache costs one warning, never a start, and an entry that is damaged is written again.
"""

import hashlib
import logging
import re
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ....kernels.cpu.prepared import LAYOUT, Prepared
from ....kernels.cpu.prepared_check import check
from ....quant.checkpoint import Checkpoint
from ....quant.private_files import why_not_private
from . import prepared_entry
from .prepared_entry import Groups

logger = logging.getLogger(__name__)

FOLDER = "prepared-weights"
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Nibble made this folder, for weights in the layout of its CPU kernels. It may be removed at any time.\n"
)
_ENTRY = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{8}\.(tmp|safetensors)")
_ABANDONED = 24 * 3600  # seconds after which nobody still writes a file
_SMALLEST = 32 << 20  # bytes of prepared weights; fewer are prepared in no time
_SHARE_OF_DISK = 0.1  # of what is free


@dataclass(slots=True)
class PreparedCache:
    """The groups of one checkpoint: read where an earlier start left them, else collected and, by `save`, left."""

    file: Path
    source: Path  # of the checkpoint
    _found: Groups = field(default_factory=dict)
    _used: Groups = field(
        default_factory=dict
    )  # of what was found and what was added: the next entry
    _changed: bool = False
    _told: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: str | Path, options: str) -> "PreparedCache":
        """`options`: whatever beside the checkpoint decides how weights are prepared."""
        source = checkpoint.path.resolve()
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        state = [
            f"{f.name} {(s := f.stat()).st_size} {s.st_mtime_ns}" for f in files if f.is_file()
        ]
        name = f"{_digest(str(source), options)}-{_digest(str(LAYOUT), *state)}.safetensors"
        cache = cls(Path(folder).expanduser() / FOLDER / name, source)
        cache._open()
        return cache

    def group(self, name: str, shapes: list[tuple[int, int]]) -> list[Prepared] | None:
        """The linears of a group, [outputs, inputs] of each, in mapped memory; None if they are to be prepared."""
        linears = self._found.pop(name, None)
        if linears is None:
            return None
        try:
            for linear, (n, k) in zip(linears, shapes, strict=True):
                check(linear, n, k)
        except ValueError as error:
            self._warn("%s is damaged and will be written again: %s: %s", self.file, name, error)
            return None
        self._used[name] = linears
        return linears

    def add(self, name: str, linears: list[Prepared]) -> None:
        """Remember a group that was prepared."""
        self._used[name], self._changed = linears, True

    def save(self) -> None:
        """Write what was used if it is not what was found, unless it is little or the disk is short, and remove what
        nothing can use any more."""
        tensors = (t for group in self._used.values() for linear in group for t in _tensors(linear))
        size = sum(tensor.nbytes for tensor in tensors)
        if not self._changed or size < _SMALLEST:
            return
        try:
            if reason := _made_folder(self.file.parent):
                self._warn("prepared weights are not kept: %s %s", self.file.parent, reason)
                return
            self._remove_stale()
            free = shutil.disk_usage(self.file.parent).free
            if size > free * _SHARE_OF_DISK:
                logger.info(
                    "prepared weights are not kept for the next start: they take %.1f of %.1f GB that are free",
                    size / 1e9,
                    free / 1e9,
                )
                return
            self._write()
        except OSError as error:
            self._warn("prepared weights are not kept for the next start: %s", error)

    def _write(self) -> None:
        name = f"{self.file.stem}-{secrets.token_hex(4)}.safetensors"
        unfinished = self.file.with_name(name)
        try:
            prepared_entry.write(unfinished, self.file.name, str(self.source), self._used)
            unfinished.chmod(0o600)
            unfinished.replace(self.file)
        except OSError:
            for file in (unfinished, unfinished.with_suffix(".tmp")):
                file.unlink(missing_ok=True)
            raise

    def _open(self) -> None:
        try:
            if reason := _why_not_ours(self.file.parent):
                self._warn("prepared weights are not used: %s %s", self.file.parent, reason)
            elif reason := why_not_private(self.file):
                self._warn("%s is not used and will be written again: it %s", self.file, reason)
            else:
                self._found = prepared_entry.read(self.file)
        except FileNotFoundError:
            pass
        except Exception as error:  # also whatever safetensors and torch make of a damaged header
            self._warn("%s is damaged and will be written again: %s", self.file, error)

    def _remove_stale(self) -> None:
        """Entries of other states of this checkpoint, of checkpoints that are gone, and what was never finished."""
        for file in self.file.parent.iterdir():
            entry, unfinished = _ENTRY.fullmatch(file.name), _UNFINISHED.fullmatch(file.name)
            if file == self.file or not (entry or unfinished) or why_not_private(file):
                continue
            if (source := prepared_entry.source_of(file)) is None:
                continue
            if unfinished:
                stale = time.time() - file.stat().st_mtime > _ABANDONED
            else:
                stale = file.name[:16] == self.file.name[:16] or not source.exists()
            if stale:
                file.unlink(missing_ok=True)

    def _warn(self, message: str, *values: object) -> None:
        """What is wrong with a cache is said once: the rest follows from it."""
        logger.log(logging.DEBUG if self._told else logging.WARNING, message, *values)
        self._told = True


def _why_not_ours(folder: Path) -> str | None:
    """None for a folder that Nibble made and nobody else can write to. FileNotFoundError where there is none."""
    if reason := why_not_private(folder, folder=True):
        return f"{reason} (give another --prepared-cache)"
    try:
        made = why_not_private(folder / _TAG) is None and (folder / _TAG).read_text() == _TAG_TEXT
    except (FileNotFoundError, UnicodeDecodeError):
        made = False
    return None if made else f"was not made by Nibble: it has no {_TAG} (move it away)"


def _made_folder(folder: Path) -> str | None:
    """Make the folder, its tag in it from the first moment, where there is none. Returns why it cannot be used."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))  # 0700
        (made / _TAG).write_text(_TAG_TEXT)
        (made / _TAG).chmod(0o600)
        try:
            made.rename(folder)
        except OSError:  # another server has made it meanwhile
            shutil.rmtree(made)
    return _why_not_ours(folder)


def _tensors(linear: Prepared) -> list[Tensor]:
    each = (linear.data, linear.scales, linear.offsets, linear.bias, linear.perm)
    return [tensor for tensor in each if tensor is not None]


def _digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
