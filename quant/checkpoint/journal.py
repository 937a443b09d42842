"""The journal of a conversion: what of it is safe on disk, so that a killed one goes on and ends in the same bytes.

    OUT.partial/           what will be OUT
      .work/journal.json   the run's fingerprint; per part its SHA-256 and what the report says of it
      .work/part-*         see writer.py
      .work/state-*        the activations that enter the next block

Invariant: an entry is written after its part and its state are durable, and the state before it is removed after that;
so whenever the run dies, the journal names parts and a state that are there and whole. What lies beyond the journal is
thrown away on resuming. The fingerprint covers everything the bytes depend on: source files, recipe, tokens, version.
"""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from torch import Tensor

from ...errors import CheckpointError
from ..hashes import file_sha256
from .base import Checkpoint
from .writer import WORK, ShardWriter, read_checked_json, save_tensors, write_checked_json

_START_AGAIN = "start again with --overwrite"


class Journal:
    """What is done of the conversion whose weights `writer` writes."""

    def __init__(self, writer: ShardWriter, fingerprint: str):
        self.writer, self.fingerprint = writer, fingerprint
        self.entries: list[dict[str, Any]] = []  # one a part: its sha256, its report
        self._state: dict[str, str] | None = None
        self._file = writer.work / "journal.json"

    @classmethod
    def open(cls, writer: ShardWriter, fingerprint: str) -> "Journal":
        """The journal that a killed run left, verified, or an empty one where there is none.

        Raises CheckpointError if the run was another one, or what it left is damaged.
        """
        journal = cls(writer, fingerprint)
        if journal._file.exists():
            content = read_checked_json(journal._file)
            if content.get("fingerprint") != fingerprint:
                raise CheckpointError(
                    "was begun from another model, with another recipe or by another version",
                    file=writer.out_dir,
                    fix=_START_AGAIN,
                )
            journal.entries, journal._state = content["parts"], content["state"]
            journal._verify()
        journal._drop_the_rest()
        return journal

    def record(
        self, part: Path, sha256: str, report: dict[str, Any], state: dict[str, Tensor] | None
    ) -> None:
        """A part is done; state: what the next block needs, None where it needs nothing."""
        previous = self._state
        if state is not None:
            file = self.writer.work / f"state-{len(self.entries):05d}.safetensors"
            self._state = {"file": file.name, "sha256": save_tensors(file, state)}
        self.entries.append({"file": part.name, "sha256": sha256, "report": report})
        write_checked_json(
            self._file,
            {"fingerprint": self.fingerprint, "parts": self.entries, "state": self._state},
        )
        if previous is not None and state is not None:
            (self.writer.work / previous["file"]).unlink(missing_ok=True)

    def state(self) -> dict[str, Tensor] | None:
        """The state given to the last `record` that had one, mapped from its file: not to be written to."""
        if self._state is None:
            return None
        with safe_open(self.writer.work / self._state["file"], "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def _verify(self) -> None:
        joining = (
            self.writer.work / "layout.json"
        ).exists()  # parts go as the shards that hold them are done
        wanted = [*self.entries, *([self._state] if self._state and not joining else [])]
        for entry in wanted:
            file = self.writer.work / entry["file"]
            whole = file_sha256(file) == entry["sha256"] if file.exists() else joining
            if not whole:
                raise CheckpointError("is missing or damaged", file=file, fix=_START_AGAIN)

    def _drop_the_rest(self) -> None:
        known = {entry["file"] for entry in self.entries} | {"journal.json", "layout.json", "lock"}
        known |= {self._state["file"]} if self._state else set()
        for file in self.writer.work.iterdir():
            if file.name not in known:
                file.unlink()


def begun(partial: Path) -> int | None:
    """How many parts a killed run has finished in `partial`; None if there is none to go on with.

    Whether the journal is whole is asked when it is opened: until then nothing of such a run may be thrown away.
    """
    work = partial / WORK
    return max(1, len(list(work.glob("part-*")))) if (work / "journal.json").exists() else None


def lock(partial: Path) -> IO[bytes]:
    """Keep others from writing to `partial` until the returned file is closed. Raises CheckpointError if one does."""
    (partial / WORK).mkdir(parents=True, exist_ok=True)
    file = (partial / WORK / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            "is being written by another conversion", file=partial, fix="wait for it"
        ) from None
    return file


def fingerprint(checkpoint: Checkpoint, *facts: object) -> str:
    """SHA-256 over the source's files (name, size, time of change), its config and any other facts (by `repr`)."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    files = sorted(folder.glob("*.safetensors")) if checkpoint.path.is_dir() else [checkpoint.path]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = json.dumps(
        [stats, checkpoint.config, [repr(fact) for fact in facts]], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()
