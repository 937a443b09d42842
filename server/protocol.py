"""The HTTP protocol: uvicorn's on h11, with a limit on how long a client may take over a request's head, and with a
short way for the body of a stream.

uvicorn itself waits for ever for the end of a head, so connections that send a byte now and then would pile up
(slowloris). The body's time is bounded where it is read, in limits.read_body.

An event of a stream is some 150 bytes; through ASGI messages and h11 it costs several times what writing it costs. So
each request's scope offers `extensions[DIRECT_WRITE]`, a function that writes one chunk of a response's body to the
connection: h11's state is the same before and after a chunk, which it would frame just so.

Both need what uvicorn keeps to itself: `check_uvicorn` says in one line at start-up if another version is without it.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import uvicorn

from ..errors import UserError

try:
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
except ImportError as error:
    raise UserError(f"uvicorn {uvicorn.__version__} is too new or too old: {error}") from None

_USED: dict[type, tuple[str, ...]] = {
    H11Protocol: ("loop", "conn", "transport", "cycle"),
    RequestResponseCycle: ("scope", "conn", "transport", "flow", "disconnected"),
}
HEAD_SECONDS = 30.0  # from a connection's or a request's first byte to the end of its head
DIRECT_WRITE = "nibble.direct_write"


def check_uvicorn() -> None:
    """UserError if the installed uvicorn's private classes are not those that this module builds on."""
    missing = [
        f"{used.__name__}.{name}"
        for used, names in _USED.items()
        for name in names
        if name not in vars(used)["__init__"].__code__.co_names  # set there
    ]
    if not callable(getattr(H11Protocol, "handle_events", None)):
        missing.append("H11Protocol.handle_events")
    if missing:
        raise UserError(
            f"uvicorn {uvicorn.__version__} has no {', '.join(missing)} "
            "(`pip install 'uvicorn>=0.34,<0.55'`)"
        )


class Protocol(H11Protocol):
    """H11Protocol that closes a connection whose head is not complete in HEAD_SECONDS, and offers DIRECT_WRITE."""

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

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not None and self.cycle is not before:
            self.cycle.scope.setdefault("extensions", {})[DIRECT_WRITE] = _direct_write(self.cycle)  # type: ignore

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None


def _direct_write(cycle: RequestResponseCycle) -> Callable[[bytes], bool]:
    """For a response without a length: writes one chunk of its body, not empty. False, where `send` must do it: the
    body is not chunked (the client speaks HTTP/1.0), no response is open, or the client does not read."""
    chunked = cycle.scope["http_version"] == "1.1" and cycle.scope["method"] != "HEAD"

    def write(data: bytes) -> bool:
        open_ = chunked and cycle.conn.our_state is h11.SEND_BODY and not cycle.flow.write_paused
        if open_ and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return True
        return False

    return write
