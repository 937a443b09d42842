"""The HTTP protocol: uvicorn's on h11, with a limit on how long a client may take and on how many may wait, and with a
short way for the body of a stream.

    head     HEAD_SECONDS from its first byte, or from the connection's
    body     BODY_SECONDS, after which limits.read_body answers; on a path that reads none the answer comes first
    rest     LINGER_SECONDS for what is still being sent of a body when the answer has been given
    reading  READ_SECONDS to take at least something of what is left of the last answer of a connection

uvicorn itself waits for ever for each of them, so connections that send a byte now and then would pile up (slowloris).
Whatever path was asked for, and before any key is looked at, who is late is cut. connections.Connections bounds how
many there are. What is no HTTP is answered as any other bad request.

An event of a stream is some 150 bytes; through ASGI messages and h11 it costs several times what writing it costs. So
each request's scope offers `extensions[DIRECT_WRITE]`, a function that writes one chunk of a response's body to the
connection: h11's state is the same before and after a chunk, which it would frame just so. `extensions[CUT]` ends the
connection at once, whatever is still to be written; `extensions[PROBES_ONLY]` is there if there is no room for more.

All this needs what uvicorn keeps to itself: `check_uvicorn` says in one line at start-up if another version is without
it.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import h11
import uvicorn

from ..errors import UserError
from . import errors
from .connections import Connections
from .limits import BODY_SECONDS

try:
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
except ImportError as error:
    raise UserError(f"uvicorn {uvicorn.__version__} is too new or too old: {error}") from None

_USED: dict[type, tuple[str, ...]] = {
    H11Protocol: ("loop", "conn", "transport", "cycle", "client"),
    RequestResponseCycle: (
        "scope",
        "conn",
        "transport",
        "flow",
        "disconnected",
        "keep_alive",
        "response_complete",
    ),
}
_METHODS = (
    "handle_events",
    "on_response_complete",
    "send_400_response",
    "timeout_keep_alive_handler",
)
HEAD_SECONDS = 30.0
LINGER_SECONDS = 5.0
READ_SECONDS = 30.0
DIRECT_WRITE, CUT, PROBES_ONLY = "nibble.direct_write", "nibble.cut", "nibble.probes_only"


def check_uvicorn() -> None:
    """UserError if the installed uvicorn's private classes are not those that this module builds on."""
    missing = [
        f"{used.__name__}.{name}"
        for used, names in _USED.items()
        for name in names
        if name not in vars(used)["__init__"].__code__.co_names  # set there
    ]
    missing += [
        f"H11Protocol.{name}" for name in _METHODS if not callable(getattr(H11Protocol, name, None))
    ]
    if missing:
        raise UserError(
            f"uvicorn {uvicorn.__version__} has no {', '.join(missing)} "
            "(`pip install 'uvicorn>=0.34,<0.55'`)"
        )


class Protocol(H11Protocol):
    """H11Protocol that cuts whoever is late, is counted in `table`, and offers the extensions."""

    def __init__(self, *args: Any, table: Connections, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.table = table
        self.address = ""
        self.has_room = True
        self._owed: tuple[str, object] | None = None  # what the client owes, and of which request
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that are not written yet, when they were last looked at

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.has_room = self.table.opened(self)
        self._expect("head", HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(has_begun=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look(has_begun=False)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not None and self.cycle is not before:
            extensions: dict[str, Any] = self.cycle.scope.setdefault("extensions", {})
            extensions[DIRECT_WRITE] = _direct_write(self.cycle)
            extensions[CUT] = self.cut
            if not self.has_room:
                extensions[PROBES_ONLY] = {}
                self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer was given already
            self.cut()
            return
        body = errors.bad_request(msg).body()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", uuid.uuid4().hex),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._look(has_begun=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self.table.closed(self)
        super().connection_lost(exc)

    def cut(self) -> None:
        """End the connection at once; what was not written yet is dropped."""
        self.transport.abort()

    def _look(self, has_begun: bool) -> None:
        """What does the client owe now? `has_begun`: it has sent something of it."""
        their_state = self.conn.their_state
        if self.transport.is_closing():  # once all is written, for which it would wait for ever
            self._unread = self.transport.get_write_buffer_size()
            self._expect("reading" if self._unread else None, READ_SECONDS)
        elif their_state is h11.SEND_BODY and self.cycle.response_complete:
            self._expect("rest", LINGER_SECONDS)
        elif their_state is h11.SEND_BODY:
            self._expect("body", BODY_SECONDS + 1)
        elif their_state is h11.IDLE and has_begun:
            self._expect("head", HEAD_SECONDS)
        elif their_state is h11.IDLE:  # kept alive: the time for that is uvicorn's
            self._expect("request", None)
        else:
            self._expect(None)

    def _expect(self, what: str | None, seconds: float | None = None) -> None:
        """The client owes `what`, and has `seconds` for it from when this was first said."""
        owed = None if what is None else (what, self.cycle)
        if owed == self._owed:
            return
        self._owed = owed
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if owed is None:
            self.table.works(self)
            return
        self.table.waits(self)
        if seconds is not None:
            late = self._late_reader if what == "reading" else self.cut
            self._timer = self.loop.call_later(seconds, late)

    def _late_reader(self) -> None:
        before, self._unread = self._unread, self.transport.get_write_buffer_size()
        if self._unread < before:
            self._timer = self.loop.call_later(READ_SECONDS, self._late_reader)
        else:
            self.cut()


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
