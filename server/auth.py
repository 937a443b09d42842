"""Who may ask: API keys, denied by default.

Every path but the three probes and the page's files needs a key, known route or not. The decision is made on
`scope["path"]`, the same value the router matches; the Host header takes no part in it (CVE-2026-48746).
"""

import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from . import errors
from .keys import ApiKey, digest
from .ui.files import is_open as is_page

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})


class AuthMiddleware:
    """Answers 401 unless the request bears one of `api_keys`. Leaves that ApiKey in `scope["tenant"]`."""

    def __init__(self, app: ASGIApp, api_keys: tuple[ApiKey, ...]):
        self.app = app
        self.api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.api_keys and not _is_open(scope):
            tenant = self.tenant(scope)
            if tenant is None:
                await errors.unauthorized().response()(scope, receive, send)
                return
            scope["tenant"] = tenant
        await self.app(scope, receive, send)

    def tenant(self, scope: Scope) -> ApiKey | None:
        borne = [digest(key) for key in _borne(scope)]
        # Every digest is compared, each in constant time: neither the key nor its position can be timed.
        matches = [
            key
            for key in self.api_keys
            for given in borne
            if secrets.compare_digest(given, key.digest)
        ]
        return matches[0] if matches else None


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or is_page(scope["method"], scope["path"])


def _borne(scope: Scope) -> list[bytes]:
    """Keys that a request bears: `Authorization: Bearer KEY`, as OpenAI's clients, `x-api-key: KEY`, as Anthropic's. A
    header that comes twice bears none."""
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    keys = []
    if len(given := headers.get(b"authorization", [])) == 1:
        scheme, _, key = given[0].partition(b" ")
        keys += [key.strip()] if scheme.lower() == b"bearer" else []
    if len(given := headers.get(b"x-api-key", [])) == 1:
        keys.append(given[0].strip())
    return keys
