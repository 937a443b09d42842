"""Typed reads from a `quantization_config`, which comes from a stranger.

Each takes the keys under which makers spell a field and raises UnsupportedError, which names the field and its value.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..errors import UnsupportedError


def unsupported(key: str, value: Any, hint: str = "") -> UnsupportedError:
    return UnsupportedError(f"quantization_config.{key} {value!r} is not supported{hint}")


def get(config: dict[str, Any], kind: type, default: Any, *keys: str) -> Any:
    """The first of the keys that is set, if it has the type."""
    for key in keys:
        if (value := config.get(key)) is not None:
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise unsupported(key, value, f" (want {kind.__name__})")
            return value
    return default


def bits(config: dict[str, Any], allowed: Iterable[int], *keys: str) -> int:
    value: int = get(config, int, None, *keys)
    if value not in allowed:
        raise unsupported(keys[0], value, f" ({', '.join(map(str, allowed))} are)")
    return value


def group_size(config: dict[str, Any], default: int, *keys: str) -> int:
    size: int = get(config, int, default, *keys)
    if size != -1 and size <= 0:
        raise unsupported(keys[0], size)
    return size


def strings(config: dict[str, Any], *keys: str) -> tuple[str, ...]:
    items = tuple(get(config, list, [], *keys))
    for item in items:
        if not isinstance(item, str):
            raise unsupported(keys[0], item)
        checked_regex(item.removeprefix("re:") if item.startswith("re:") else "", keys[0])
    return items


def checked_regex(pattern: str, key: str) -> str:
    try:
        re.compile(pattern)
    except re.error:
        raise unsupported(key, pattern, " (no valid regular expression)") from None
    return pattern
