"""Renderer: chat templates rendered in a process of their own (template_process.py), for one asyncio event loop.

Conversations wait in a queue and are rendered one at a time, in order; one whose caller is cancelled gives up its
turn. A process that a template has ended, or that has died of anything else, costs the conversation that was being
rendered, and the next one finds a new process. One process is enough: an ordinary conversation takes a few hundred
microseconds, the longest that a request can bring tens of milliseconds, both far less than the model takes to read it.
"""

import asyncio
import logging
import signal
import sys
from collections import deque

import msgspec

from .. import child
from ..messages import FrameReader, frame
from .chat_template import ChatFormat, Conversation
from .template_process import CPU_SECONDS, Refused, Rendered, Reply, Started, decode_reply

log = logging.getLogger(__name__)

# -P: a folder named like a library in the working directory must not be imported in its place.
TEMPLATE_COMMAND = (sys.executable, "-P", "-m", "nibble.engine.text.template_process")


class RendererBusyError(Exception):
    """As many conversations as may are waiting already."""


class RendererClosedError(Exception):
    """Nothing is rendered any more."""


class Renderer:
    """Renders the conversations of one checkpoint. Used from one event loop."""

    def __init__(self, chat_format: ChatFormat, max_waiting: int):
        self._format = chat_format
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[Conversation, asyncio.Future[str]]] = deque()
        self._rendering: asyncio.Future[str] | None = None
        self._process: _Process | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process now, so that the first conversation need not wait for it."""
        if self._format.templates:
            self._process = _Process(self)

    @property
    def is_idle(self) -> bool:
        """Whether the next conversation need not wait for others."""
        return self._rendering is None

    async def render(self, conversation: Conversation) -> str:
        """The prompt text, marked as ChatRenderer.render marks it. ValueError, fit for the client to read, if the
        template refuses the messages, fails or is ended; RendererBusyError if the queue is full; RendererClosedError
        after `close`."""
        if self._closed:
            raise RendererClosedError
        if len(self._waiting) >= self._max_waiting:
            raise RendererBusyError
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((conversation, future))
        self._next()
        try:
            return await future
        finally:
            del future  # whose exception holds this frame, and would hold itself through it

    def close(self) -> None:
        """End the process; what still waits hears of it."""
        self._closed = True
        self._end_process()
        for future in (self._rendering, *(future for _, future in self._waiting)):
            if future is not None and not future.done():
                future.set_exception(RendererClosedError())
        self._waiting.clear()

    def _next(self) -> None:
        while self._rendering is None and self._waiting:
            conversation, future = self._waiting.popleft()
            if future.done():  # its caller has left
                continue
            if self._process is None:
                self._process = _Process(self)
            self._rendering = future
            self._process.send(conversation)

    def on_reply(self, reply: Reply) -> None:
        if isinstance(reply, Started):
            for problem in reply.problems:
                log.warning("%s; this model is served without it", problem)
            return
        future, self._rendering = self._rendering, None
        if isinstance(reply, Refused) and reply.exhausted:
            self._end_process()
        if future is not None and not future.done():
            if isinstance(reply, Rendered):
                future.set_result(reply.text)
            else:
                future.set_exception(ValueError(reply.error))
        self._next()

    def on_end(self, process: "_Process", how: str) -> None:
        if process is not self._process:  # was ended from here
            return
        self._process = None
        future, self._rendering = self._rendering, None
        log.warning("the process that renders chat templates has ended: it %s", how)
        if future is not None and not future.done():
            future.set_exception(ValueError(f"the chat template was ended: it {how}"))
        self._next()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()


class _Process(asyncio.Protocol):
    """One template process and the socket to it."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._frames = FrameReader()
        self._unsent: list[bytes] = [frame(renderer._format)]
        self._transport: asyncio.Transport | None = None
        self._popen, self._sock = child.spawn(TEMPLATE_COMMAND)
        self._connecting = asyncio.ensure_future(
            asyncio.get_running_loop().create_connection(lambda: self, sock=self._sock)
        )

    def send(self, message: msgspec.Struct) -> None:
        if self._transport is None:
            self._unsent.append(frame(message))
        else:
            self._transport.write(frame(message))

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._connecting.cancel()
            self._sock.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.writelines(self._unsent)  # type: ignore[attr-defined]
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._renderer.on_reply(decode_reply(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._popen.kill()  # for one that has closed its socket and lives
        code = self._popen.wait()
        if code == -signal.SIGPROF:
            how = f"took more than {CPU_SECONDS:g} s"
        else:
            how = f"ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"
        self._renderer.on_end(self, how)
