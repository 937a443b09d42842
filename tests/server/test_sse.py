"""Event streams and connections against clients that are slow, silent or gone, with the clock turned up."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import partial

import pytest
import uvicorn
from starlette.types import Message

from nibble.errors import UserError
from nibble.server import protocol, sse
from nibble.server.connections import Connections


class Client:
    """Both ends of one ASGI exchange. `leave` is http.disconnect; while `stuck`, it reads nothing."""

    def __init__(self) -> None:
        self.body, self.leave, self.stuck = b"", asyncio.Event(), False

    async def receive(self) -> Message:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        while self.stuck:
            await asyncio.sleep(0.01)
        self.body += message.get("body", b"")


class Source:
    """Events one after the other, `pause` seconds apart; knows whether it was closed."""

    def __init__(self, pause: float, count: int):
        self.pause, self.count, self.closed = pause, count, False

    def start(self, push: sse.Push) -> None:
        self.push = push
        self.task = asyncio.ensure_future(self.events())

    async def events(self) -> None:
        for i in range(self.count):
            self.push(b"data: %d\n\n" % i, i == self.count - 1)
            await asyncio.sleep(self.pause)

    def close(self) -> None:
        self.closed = True
        self.task.cancel()


async def play(source: Source, client: Client, *, leave_after: float | None = None) -> list[bool]:
    """Run the stream to its end. Returns what on_close heard."""
    heard: list[bool] = []
    stream = sse.EventStream(source, heard.append)
    if leave_after is not None:
        asyncio.get_running_loop().call_later(leave_after, client.leave.set)
    await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), 5)
    return heard


def test_a_whole_stream() -> None:
    async def run() -> None:
        client, source = Client(), Source(0, 3)
        assert await play(source, client) == [False]
        assert client.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n" and source.closed

    asyncio.run(run())


def test_a_client_that_leaves_closes_the_source() -> None:
    async def run() -> None:
        client, source = Client(), Source(60, 2)
        assert await play(source, client, leave_after=0.05) == [True]
        assert source.closed

    asyncio.run(run())


def test_silence_is_filled_with_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.03)

    async def run() -> None:
        client = Client()
        await play(Source(0.3, 2), client)
        assert client.body.count(b": ping\n\n") >= 3
        assert client.body.replace(b": ping\n\n", b"") == b"data: 0\n\ndata: 1\n\n"

    asyncio.run(run())


def test_a_reader_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.03)
    monkeypatch.setattr(sse, "SEND_TIMEOUT_SECONDS", 0.1)

    async def run() -> None:
        client, source = Client(), Source(0.01, 100)
        asyncio.get_running_loop().call_later(0.05, setattr, client, "stuck", True)
        assert await play(source, client) == [True]
        assert source.closed

    asyncio.run(run())


def test_a_source_that_cannot_start_is_closed() -> None:
    class Broken(Source):
        def start(self, push: sse.Push) -> None:
            super().start(push)
            raise ValueError("broken")

    async def run() -> None:
        client, heard, source = Client(), [], Broken(0, 1)
        with pytest.raises(ValueError, match="broken"):
            await sse.EventStream(source, heard.append)(
                {"type": "http"}, client.receive, client.send
            )
        assert len(heard) == 1 and source.closed

    asyncio.run(run())


def test_work_stops_when_the_client_leaves() -> None:
    async def run() -> None:
        client, stopped = Client(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()

        asyncio.get_running_loop().call_later(0.05, client.leave.set)
        with pytest.raises(sse.ClientGone):
            await sse.until_disconnect(client.receive, work())
        assert stopped.is_set()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def listening(
    app: Callable, table: Connections | None = None, keep_alive: int = 5
) -> AsyncGenerator[int, None]:
    http = partial(protocol.Protocol, table=Connections(100, 0) if table is None else table)
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=0, http=http, lifespan="off", log_config=None, timeout_keep_alive=keep_alive
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


def test_a_head_that_never_ends_is_cut_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)

    async def slow_app(scope: dict, receive: Callable, send: Callable) -> None:
        await asyncio.sleep(0.6)  # longer than a head may take: answers have all the time they need
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> None:
        async with listening(slow_app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            good, good_writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):  # the second on a connection kept alive
                good_writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                writer.write(b"GET / HT" if not reader.at_eof() else b"")
                answer = await asyncio.wait_for(good.readuntil(b"ok"), 5)
                assert answer.startswith(b"HTTP/1.1 200")
            assert await asyncio.wait_for(reader.read(), 1) == b""
            good_writer.write(b"GET / HTTP/1.1\r\n")
            assert await asyncio.wait_for(good.read(), 2) == b""
            writer.close()
            good_writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(("version", "chunked"), [("1.1", True), ("1.0", False)])
def test_a_stream_on_a_real_connection_is_framed_as_http_has_it(
    version: str, chunked: bool
) -> None:
    heard: list[bool] = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await sse.EventStream(Source(0.01, 3), heard.append)(scope, receive, send)

    async def run() -> None:
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2 if chunked else 1):  # the connection can be used again
                writer.write(f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert (b"transfer-encoding: chunked" in head.lower()) == chunked
                body = await asyncio.wait_for(
                    reader.readuntil(b"0\r\n\r\n") if chunked else reader.read(), 5
                )
                events = b"".join(_chunks(body)) if chunked else body
                assert events == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
            writer.close()

    asyncio.run(run())
    assert heard == [False, False] if chunked else [False]


def _chunks(body: bytes) -> list[bytes]:
    chunks = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        end = int(size, 16)
        assert rest[end : end + 2] == b"\r\n"
        chunks.append(rest[:end])
        body = rest[end + 2 :]
    return chunks


def test_a_reader_that_pauses_gets_everything_in_order() -> None:
    count = 4000

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        class Flood(Source):
            async def events(self) -> None:
                for i in range(self.count):
                    self.push(b"data: %0250d\n\n" % i, i == self.count - 1)
                    if i % 100 == 0:
                        await asyncio.sleep(0)

        await sse.EventStream(Flood(0, count), lambda _: None)(scope, receive, send)

    async def run() -> None:
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await asyncio.sleep(0.2)
            body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")[2]
            events = b"".join(_chunks(body)).split(b"\n\n")[:-1]
            assert [int(event.removeprefix(b"data: ")) for event in events] == list(range(count))
            writer.close()

    asyncio.run(run())


def test_no_exception_of_a_connection_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def broken_receive() -> Message:
        raise ValueError("receive broke")

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("work broke while it ended")

    async def run() -> None:
        with pytest.raises(sse.ClientGone):
            await sse.until_disconnect(broken_receive, stubborn())

    asyncio.run(run())
    assert "receive broke" in caplog.text and "work broke while it ended" in caplog.text


def test_another_uvicorn_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol.check_uvicorn()

    class Cycle:
        def __init__(self, scope: dict, conn: object, transport: object) -> None:
            self.scope, self.conn, self.transport = scope, conn, transport

    monkeypatch.setitem(protocol._USED, Cycle, ("scope", "conn", "transport", "flow"))
    monkeypatch.delattr(protocol.H11Protocol, "handle_events")
    with pytest.raises(UserError, match=r"has no Cycle.flow, H11Protocol.handle_events \(`pip"):
        protocol.check_uvicorn()
