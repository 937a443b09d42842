"""API keys: where they come from, what a key may look like, and what it is called.

    --api-key KEY            repeatable; every user of the machine can read a command line
    --api-key-file FILE      a line for each: `name:key`, or a key alone; `#` begins a comment
    NIBBLE_API_KEY           one key, where no flag gives any

Only a key's digest is kept, so that no log, error or metric can show the key; its name stands for it there. A source
that was named and holds no key is an error: a server that was meant to be locked is never served openly.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

MAX_FILE_BYTES = 2**20
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_KEY = re.compile(r"[!-~]{1,4096}")  # visible ASCII: what a header carries unchanged


class ApiKey(NamedTuple):
    """A key that clients may bear."""

    name: str  # what logs and metrics call whoever bears it
    digest: bytes


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def given(keys: Sequence[str], source: str) -> tuple[ApiKey, ...]:
    """Keys as they were given one by one, named key-1, key-2, ... UserError names `source`, and never the key."""
    return _named(
        (f"{source}{f' (number {i + 1})' if len(keys) > 1 else ''}", None, key)
        for i, key in enumerate(keys)
    )


def from_file(path: str, others: tuple[ApiKey, ...] = ()) -> tuple[ApiKey, ...]:
    """`others` and the keys of a file. UserError if it cannot be read, others may read or change it, or it holds
    none."""
    keys = _named(
        (
            (f"{path}, line {number}", *_split(line))
            for number, line in enumerate(_read(path).splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#")
        ),
        others,
    )
    if len(keys) == len(others):
        raise UserError(f"{path}: holds no key (write a line for each, as name:key)")
    return keys


def _split(line: str) -> tuple[str | None, str]:
    name, colon, key = line.strip().partition(":")
    return (name.strip(), key.strip()) if colon else (None, name)


def _named(
    found: Iterable[tuple[str, str | None, str]], others: tuple[ApiKey, ...] = ()
) -> tuple[ApiKey, ...]:
    """`others`, and keys of (where, name or None, key), each with a name of its own."""
    keys = list(others)
    for where, name, key in found:
        name = f"key-{len(keys) + 1}" if name is None else name
        if not key:
            raise UserError(f"{where}: the API key is empty")
        if not _KEY.fullmatch(key):
            raise UserError(f"{where}: an API key is made of visible ASCII characters, no spaces")
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: a key's name is made of letters, digits, '.', '_' and '-'")
        for other in keys:
            if other.name == name or other.digest == digest(key.encode()):
                raise UserError(f"{where}: the name or the key is that of '{other.name}', too")
        keys.append(ApiKey(name, digest(key.encode())))
    return tuple(keys)


def _read(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
                raise UserError(
                    f"{path}: others may read or change this file (chmod 600 {path}, then start again)"
                )
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; is it a file of keys?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; is it a file of keys?") from None
