"""The errors a user may meet while a checkpoint is read or written.

Each message is one line: what is wrong, where (file and tensor), how to fix it. Command-line verbs print it and exit
with code 2; a traceback is shown only with --debug.
"""

from pathlib import Path


class UserError(Exception):
    """Bad input: the message says what, where and how to fix."""


class CheckpointError(UserError):
    """A checkpoint on disk is unusable. Names the file and, where there is one, the tensor."""

    def __init__(
        self,
        problem: str,
        *,
        file: Path | str | None = None,
        tensor: str | None = None,
        fix: str = "",
    ):
        where = ", ".join(
            part for part in (str(file or ""), f"tensor {tensor!r}" if tensor else "") if part
        )
        super().__init__(f"{where}: {problem}" + (f" ({fix})" if fix else "") if where else problem)
        self.file, self.tensor = file, tensor


class UnsupportedError(UserError):
    """Well-formed, but outside what Nibble does. Names the field and the value."""
