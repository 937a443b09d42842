"""Memory of large request bodies goes back to the system once they are done with.

glibc keeps what is freed for the next allocation. After a few bodies of some MiB it also stops taking blocks of their
size from the system one by one, and carves them out of its heap, where whatever small is allocated behind a block keeps
it from ever shrinking. So its threshold is fixed, and after a request with a large body its heaps are trimmed. Other C
libraries are left as they are.
"""

import asyncio
import ctypes
import gc
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGE_BYTES = 2**20
TRIM_SECONDS = 1.0  # after a large body; one trim for all that came meanwhile
_M_MMAP_THRESHOLD = -3  # malloc.h


class TrimMiddleware:
    """Trims the heaps of this process, off the event loop, a moment after a request with a large body has ended."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self._libc = _glibc()
        self._task: asyncio.Task[None] | None = None
        if self._libc is not None:
            self._libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            if size >= LARGE_BYTES and self._libc is not None and self._task is None:
                self._task = asyncio.create_task(self._trim(self._libc))

    async def _trim(self, libc: Any) -> None:
        try:
            await asyncio.sleep(TRIM_SECONDS)
            await asyncio.to_thread(_collect_and_trim, libc)
        finally:
            self._task = None


def _collect_and_trim(libc: Any) -> None:
    gc.collect()  # an exception that a task has raised holds its frames, and they hold it
    libc.malloc_trim(0)


def _glibc() -> Any:
    """None where the C library is another one."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
