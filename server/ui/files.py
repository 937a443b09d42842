"""The page's files, and the headers that hold it to them.

They hold nothing secret and need no key: the page asks for one and sends it as any client does. Its policy lets it run,
fetch and show only what this server gives; what a model writes is never HTML in it.
"""

import hashlib
import mimetypes
from pathlib import Path

from fastapi import Request, Response

FOLDER = Path(__file__).parent
INDEX = "index.html"
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, but asked after
}
_SUFFIXES = {".html", ".css", ".js", ".svg"}
_TYPES = {".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


class Page:
    """Its files, read once."""

    def __init__(self) -> None:
        self._files = {
            file.name: file.read_bytes() for file in FOLDER.iterdir() if file.suffix in _SUFFIXES
        }

    def file(self, request: Request, name: str) -> Response | None:
        """A file of the page, or 304 where the browser has it; None where there is no such file."""
        content = self._files.get(name)
        if content is None:
            return None
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = _HEADERS | {"etag": etag}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_media_type(name))


def is_open(method: str, path: str) -> bool:
    """Whether a path is the page's, which nobody needs a key for."""
    return method in ("GET", "HEAD") and (path in ("/", "/ui") or path.startswith("/ui/"))


def _media_type(name: str) -> str:
    suffix = Path(name).suffix
    return _TYPES.get(suffix) or f"{mimetypes.types_map[suffix]}; charset=utf-8"
