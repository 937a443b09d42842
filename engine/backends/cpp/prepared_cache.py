"""Prepared weights on disk: what one start lays out for the C++ kernels, the next one reads.

    <folder>/<checkpoint>-<state>.safetensors   16 hex digits each: of the checkpoint's path and the options that change
                                                what is prepared; of its files as they are and the kernels' layout
        source               uint8: the checkpoint's path, so that an entry without one can be found and removed
        <group>.<i>.numbers   float64: the scalars of the group's i-th linear
        <group>.<i>.<field>   its tensors

Invariant: a file under its final name is whole, and holds what the checkpoint would be prepared to again. Whatever else
is wrong with the cache costs a line in the log, never a start.
"""

import hashlib
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ....kernels.cpu.prepared import LAYOUT, Prepared
from ....quant.checkpoint import Checkpoint
from ....quant.checkpoint.writer import save_tensors

logger = logging.getLogger(__name__)

_NUMBERS = ("format", "n", "k", "group", "offset", "midpoint", "multiplier")
_TENSORS = ("data", "scales", "offsets", "bias", "perm")
_SMALLEST = 32 << 20  # bytes of prepared weights; fewer are prepared in no time
_SHARE_OF_DISK = 0.1  # of what is free


@dataclass(slots=True)
class PreparedCache:
    """The groups of one checkpoint: read where an earlier start left them, else collected and, by `save`, left."""

    file: Path
    source: Path  # of the checkpoint
    _added: dict[str, Tensor] = field(default_factory=dict)
    _found: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: str | Path, options: str) -> "PreparedCache":
        """`options`: whatever beside the checkpoint decides how weights are prepared."""
        source = checkpoint.path.resolve()
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        state = [
            f"{f.name} {(s := f.stat()).st_size} {s.st_mtime_ns}" for f in files if f.is_file()
        ]
        name = f"{_digest(str(source), options)}-{_digest(str(LAYOUT), *state)}.safetensors"
        cache = cls(Path(folder).expanduser() / name, source)
        cache._open()
        return cache

    def group(self, name: str) -> list[Prepared] | None:
        """The linears of a group, in mapped memory; None if they are to be prepared."""
        linears: list[Prepared] = []
        while (numbers := self._found.get(f"{name}.{len(linears)}.numbers")) is not None:
            prefix = f"{name}.{len(linears)}."
            scalars = dict(zip(_NUMBERS, numbers.tolist(), strict=True))
            integers = {key: int(value) for key, value in scalars.items() if key != "multiplier"}
            tensors = {key: self._found.get(prefix + key) for key in _TENSORS}
            linears.append(Prepared(**integers, multiplier=scalars["multiplier"], **tensors))  # type: ignore[arg-type]
        return linears or None

    def add(self, name: str, linears: list[Prepared]) -> None:
        """Remember a group that was prepared."""
        for i, linear in enumerate(linears):
            prefix = f"{name}.{i}."
            scalars = [getattr(linear, key) for key in _NUMBERS]
            self._added[prefix + "numbers"] = torch.tensor(scalars, dtype=torch.float64)
            self._added |= {
                prefix + key: t for key in _TENSORS if (t := getattr(linear, key)) is not None
            }

    def save(self) -> None:
        """Write what was added, unless it is little or the disk is short, and remove what nothing can use any more."""
        size = sum(tensor.nbytes for tensor in self._added.values())
        if size < _SMALLEST:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_stale()
            free = shutil.disk_usage(self.file.parent).free
            if size > free * _SHARE_OF_DISK:
                logger.info(
                    "prepared weights are not kept for the next start: they take %.1f of %.1f GB that are free",
                    size / 1e9,
                    free / 1e9,
                )
                return
            with tempfile.TemporaryDirectory(dir=self.file.parent) as folder:
                written = Path(folder) / self.file.name
                save_tensors(written, self._added | {"source": _bytes(str(self.source))})
                written.replace(self.file)
        except OSError as error:
            logger.warning("prepared weights are not kept for the next start: %s", error)

    def _open(self) -> None:
        try:
            with safe_open(self.file, framework="pt") as tensors:
                self._found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read and will be written again: %s", self.file, error)

    def _remove_stale(self) -> None:
        """Entries of other states of this checkpoint, and of checkpoints that are gone."""
        for file in self.file.parent.glob("*.safetensors"):
            if file.name.startswith(self.file.name.partition("-")[0]) or not _source(file).exists():
                file.unlink(missing_ok=True)


def _source(file: Path) -> Path:
    """The checkpoint that an entry is of; a path that does not exist where the entry is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return Path(bytes(tensors.get_tensor("source").tolist()).decode())
    except (OSError, SafetensorError):
        return file / "damaged"


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
