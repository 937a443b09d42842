"""Server-sent events, and streams of other forms.

    source -> push(bytes) -> the connection     in the caller's own call, while the reader keeps up
                          -> pending -> send     through this response's task, once it does not
    receive() == http.disconnect                 closes the source: the engine requests are aborted within a step
    15 s of silence                              ": ping" (or what the form has) keeps proxies from closing
    30 s blocked in one send                     the reader is too slow and is cut (protocol.CUT)

Hot path: bytes already joined and, where the server offers it (protocol.DIRECT_WRITE), no ASGI message and no task.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from .protocol import CUT, DIRECT_WRITE

log = logging.getLogger(__name__)

PING_SECONDS = 15.0
SEND_TIMEOUT_SECONDS = 30.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")
Push: TypeAlias = Callable[[bytes, bool], None]  # whole events; True with the last


class Source(Protocol):
    """Where events come from. Both are called once, `close` however the stream ends."""

    def start(self, push: Push) -> None: ...

    def close(self) -> None: ...


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, cancelled with ClientGone if the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, gone)
        # What `task` raised holds this frame, and would hold itself through it: megabytes, until the collector comes
        del task, gone


class EventStream(Response):
    """Sends what `source` pushes. `on_close(disconnected)` runs exactly once, however it ends."""

    def __init__(
        self,
        source: Source,
        on_close: Callable[[bool], None],
        media_type: str = "text/event-stream",
        ping: bytes = PING,
    ):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self.source, self.on_close, self.ping = source, on_close, ping
        self.write: Callable[[bytes], bool] = _nowhere
        self.pending: list[bytes] = []  # what could not be written at once
        self.sending = False
        self.ended = False  # the last event has been pushed
        self.silent = True  # nothing was pushed since the last look
        self.wake = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = scope.get("extensions", {})
        self.write = extensions.get(DIRECT_WRITE, _nowhere)
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self.wake.set())
        finished = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self.source.start(self.push)
            finished = await self._relay(gone, send)
            if not finished and not gone.done():
                tenant = scope.get("tenant")
                log.info(
                    "%s was cut: it read nothing for %g s",
                    tenant.name if tenant else "a client",
                    SEND_TIMEOUT_SECONDS,
                )
                if CUT in extensions:
                    extensions[CUT]()
                    await gone
        finally:
            self.source.close()
            await _cancel(gone)
            self.on_close(not finished)

    def push(self, data: bytes, last: bool) -> None:
        self.silent = False
        self.ended = last
        if last or self.pending or self.sending or not self.write(data):
            self.pending.append(data)
            self.wake.set()

    async def _relay(self, gone: "asyncio.Future[None]", send: Send) -> bool:
        """Send what is pending, and pings, until the end. False: the client left, or was cut."""
        while not gone.done():
            self.wake.clear()
            if self.pending or self.ended:
                data, more = b"".join(self.pending), not self.ended
                self.pending.clear()
                if not await self._send(send, data, more, gone) or not more:
                    return not more
                continue
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self.wake.wait()
            except TimeoutError:
                if self.silent and not self.pending:
                    self.pending.append(self.ping)
                self.silent = True
        return False

    async def _send(
        self, send: Send, data: bytes, more: bool, gone: "asyncio.Future[None]"
    ) -> bool:
        """False if the reader did not take it in time, or left."""
        self.sending = True
        task = asyncio.ensure_future(
            _as_task(send({"type": "http.response.body", "body": data, "more_body": more}))
        )
        try:
            await asyncio.wait(
                {task, gone}, timeout=SEND_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                task.result()
                return True
            return False
        finally:
            self.sending = False
            await _cancel(task)


def _nowhere(_: bytes) -> bool:
    return False


async def _as_task(sending: Any) -> None:
    await sending


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has left, or cannot be heard any more."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:
        log.exception("a connection failed")


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    """End tasks that still run. What they raise while they end is logged; whoever saw a task end has its result."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    for result in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("a task failed while it was cancelled", exc_info=result)
