"""The HTTP protocol: uvicorn's on h11, with a limit on how long a client may take over a request's head.

uvicorn itself waits for ever for the end of a head, so connections that send a byte now and then would pile up
(slowloris). The body's time is bounded where it is read, in limits.read_body.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0  # from a connection's or a request's first byte to the end of its head


class Protocol(H11Protocol):
    """H11Protocol that closes a connection whose head is not complete in HEAD_SECONDS."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.head_timer is None and not self.transport.is_closing():
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
