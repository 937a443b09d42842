"""Whether a file or folder that Nibble keeps for itself can be believed: nobody but its user may write there. No torch.

What another user could write, a start must not read: it would serve that user's weights. root may write anywhere
anyhow, so that what it owns (a folder baked into an image) is believed too.
"""

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def why_not_private(path: Path, *, folder: bool = False) -> str | None:
    """None where `path` is a regular file (folder: a directory) that others cannot write to, else what it is instead.

    A symbolic link is neither. Raises OSError where nothing is there, or it cannot be seen.
    """
    status = path.lstat()
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        return "is no folder" if folder else "is no regular file"
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & _OTHERS_WRITE:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None
