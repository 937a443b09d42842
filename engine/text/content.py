"""Content of messages as a chat template takes it: a text, or a list of parts, as templates of models that see do.

{"role": "user", "content": "hi"}    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
"""

import re
from collections.abc import Sequence
from typing import Any

_LOOP = re.compile(r"\bfor\s+\w+\s+in\s+(\w+\.content|\w+\[['\"]content['\"]\]|content\b)")
_TELLS = re.compile(r"\bis\s+(not\s+)?(string|iterable|sequence|mapping)\b")


class ContentForm:
    """What one template goes through: parts where it loops over them, and texts too where it tells the two apart."""

    def __init__(self, template: str):
        self._takes_parts = _LOOP.search(template) is not None
        self._takes_text = not self._takes_parts or _TELLS.search(template) is not None

    def of(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages in that form. ValueError, fit for the client to read, for parts where it takes none."""
        if not self._takes_parts and any(isinstance(m.get("content"), list) for m in messages):
            raise ValueError("this model's chat template has no place for images")
        if self._takes_text:
            return list(messages)
        return [{**message, "content": as_parts(message.get("content"))} for message in messages]


def as_parts(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Content as a list of parts."""
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
