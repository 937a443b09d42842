"""Server-sent events: one task writes, one waits for the client to leave.

    deltas -> encode -> send        the pump, a task of its own
    receive() == http.disconnect    cancels the pump: closing the generators aborts the engine requests within a step
    15 s of silence                 ": ping" keeps proxies from closing
    30 s blocked in one send        the reader is too slow and is cut

Hot path: one `send` per event, bytes already joined; no pydantic, no intermediate dict.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15.0
SEND_TIMEOUT_SECONDS = 30.0
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")


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


class EventStream(Response):
    """Sends `events`, whole SSE frames as bytes. `on_close(disconnected)` runs exactly once, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[bool], None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.on_close = events, on_close
        self.last_sent = time.monotonic()
        self.sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not pump.done() and not gone.done():
                await asyncio.wait({pump, gone}, timeout=PING_SECONDS / 3, return_when=asyncio.FIRST_COMPLETED)
                await self._tend(pump, send)
            if pump.done() and not pump.cancelled():
                pump.result()
        finally:
            finished = pump.done() and not pump.cancelled()
            await _cancel(pump, gone)
            self.on_close(not finished)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in events:
                self.sending = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self.sending = False
                self.last_sent = time.monotonic()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tend(self, pump: "asyncio.Future[None]", send: Send) -> None:
        """Ping a silent stream; cut one whose reader does not read."""
        silent = time.monotonic() - self.last_sent
        if self.sending and silent > SEND_TIMEOUT_SECONDS:
            pump.cancel()
            await asyncio.wait({pump})
        elif not self.sending and not pump.done() and silent > PING_SECONDS:
            self.last_sent = time.monotonic()
            await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
