"""Too many connections, slow ones and strange ones: whose place is given to whom, and that probes are answered."""

import asyncio
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nibble.errors import UserError
from nibble.server import connections, logs, protocol, sse
from nibble.server.app import create_app
from nibble.server.connections import Connections, connection_limit
from nibble.server.serving import Serving

from .conftest import ServerProcess
from .test_http import is_openai_error, raw
from .test_sse import Source, listening


class Peer:
    def __init__(self, address: str = "127.0.0.1"):
        self.address, self.is_cut = address, False

    def cut(self) -> None:
        self.is_cut = True


def test_the_one_that_has_waited_longest_goes() -> None:
    table, peers = Connections(3, 0), [Peer() for _ in range(4)]
    assert all(table.opened(peer) for peer in peers[:3])
    table.works(peers[0])
    table.works(peers[1])
    table.waits(peers[1])  # it had its answer after peers[2] came: now that is the one
    assert table.opened(peers[3]) and len(table) == 3
    assert [peer.is_cut for peer in peers] == [False, False, True, False]
    table.closed(peers[2])
    assert len(table) == 3


def test_who_is_being_answered_is_left_alone_and_the_next_may_only_probe() -> None:
    table, busy = Connections(2, 0), [Peer(), Peer()]
    for peer in busy:
        table.opened(peer)
        table.works(peer)
    extra = [Peer() for _ in range(connections.PROBES + 1)]
    for peer in extra:
        assert not table.opened(peer)
        table.works(peer)
    assert [peer.is_cut for peer in (*busy, *extra)] == [False] * 26 + [True]
    table.closed(busy[0])
    for peer in extra:
        table.closed(peer)
    assert len(table) == 1 and table.opened(Peer())


@pytest.mark.parametrize(
    ("addresses", "cut"),
    [
        (["10.0.0.1"] * 3, [True, False, False]),
        (["10.0.0.1", "10.0.0.2", "10.0.0.1"], [False, False, False]),
        (["2001:db8::1", "2001:db8::2", "2001:db8::3"], [True, False, False]),
        (["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"], [False, False, False]),
        (["::ffff:10.0.0.1", "10.0.0.1", "10.0.0.1"], [True, False, False]),
        (["127.0.0.1"] * 3, [False, False, False]),  # where a proxy comes from
        (["::1"] * 3, [False, False, False]),
        (["::ffff:127.0.0.1"] * 3, [False, False, False]),
        ([""] * 3, [False, False, False]),
    ],
)
def test_one_address_may_have_only_some_that_wait(addresses: list[str], cut: list[bool]) -> None:
    table, peers = Connections(100, 2), [Peer(address) for address in addresses]
    assert all(table.opened(peer) for peer in peers)
    assert [peer.is_cut for peer in peers] == cut
    for peer in peers:
        table.closed(peer)
    assert len(table) == 0 and not table._waiting and not table._by_group


def test_answered_ones_of_an_address_do_not_count() -> None:
    table, peers = Connections(100, 2), [Peer("10.0.0.1") for _ in range(9)]
    for peer in peers:
        table.opened(peer)
        table.works(peer)
    assert not any(peer.is_cut for peer in peers)


def test_the_limit_follows_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_files(files: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))

    with_files(256)
    assert connection_limit(None) == 256 - connections.RESERVED_FILES == connection_limit(176)
    assert connection_limit(10) == 10
    with pytest.raises(UserError, match=r"--max-connections 177 needs 257 .*\(ulimit -n 257"):
        connection_limit(177)
    with_files(2**20)
    assert connection_limit(None) == connections.DEFAULT_LIMIT
    with_files(resource.RLIM_INFINITY)
    assert connection_limit(None) == connections.DEFAULT_LIMIT and connection_limit(10**6) == 10**6


def test_out_of_descriptors_a_connection_is_closed_and_the_next_is_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connections.Listener(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        refused = socket.create_connection(listener.getsockname())
        served = socket.create_connection(listener.getsockname())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = os.dup(0)  # no descriptor below this one is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        try:
            os.close(taken)
            fillers = []
            while True:
                try:
                    fillers.append(os.dup(0))
                except OSError:
                    break
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert refused.recv(1) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        accepted, _ = listener.accept()
        accepted.sendall(b"x")
        assert served.recv(1) == b"x" and "no file descriptor is left" in caplog.text
        for sock in (refused, served, accepted):
            sock.close()


# On real connections, in this process


async def answer_at_once(scope: dict, receive: Callable, send: Callable) -> None:
    """What /health, a 404 and a 401 do: they read no body."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_body_that_nobody_reads_is_cut_and_the_connection_is_good_if_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)
    head = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"

    async def run() -> None:
        async with listening(answer_at_once) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(2):  # the first body ends in time
                writer.write(head + b"ab")
                assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(
                    b"HTTP/1.1 200"
                )
                writer.write(b"cd")
            writer.write(head + b"a")
            await asyncio.wait_for(reader.readuntil(b"ok"), 5)
            began = time.monotonic()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            assert time.monotonic() - began > 0.2
            writer.close()

    asyncio.run(run())


def test_a_body_that_never_ends_is_cut_whoever_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", -0.7)  # one second later: a third
    left: list[dict] = []

    async def read_all(scope: dict, receive: Callable, send: Callable) -> None:
        while (message := await receive())["type"] == "http.request":
            pass
        left.append(message)

    async def run() -> None:
        async with listening(read_all) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.close()

    asyncio.run(run())
    assert left == [{"type": "http.disconnect"}]


async def answer_at_length(scope: dict, receive: Callable, send: Callable) -> None:
    """What is kept alive for half a second, unless the client wants the connection closed."""
    head = [(b"content-length", b"%d" % 2**23)]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"x" * 2**23})


def narrow(port: int) -> socket.socket:
    """A connection on which the kernel keeps little that is not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect(("127.0.0.1", port))
    return sock


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_who_does_not_read_the_last_answer_is_cut_and_who_reads_slowly_is_not(
    monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.4)
    request = f"GET / HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n".encode()

    async def run() -> None:
        table = Connections(10, 0)
        async with listening(answer_at_length, table, keep_alive=1) as port:
            _, idle = await asyncio.open_connection(sock=narrow(port), limit=4096)
            idle.write(request)
            reader, slow = await asyncio.open_connection(sock=narrow(port), limit=2**20)
            slow.write(request)
            size = len(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5))
            whole = size + 2**23
            while size < whole and (data := await asyncio.wait_for(reader.read(2**20), 5)):
                size += len(data)
                await asyncio.sleep(0.15 * (len(data) / 2**20))
            assert size == whole
            async with asyncio.timeout(5):
                while len(table):
                    await asyncio.sleep(0.01)
            idle.close()
            slow.close()

    asyncio.run(run())


def test_where_there_is_no_room_only_probes_are_answered() -> None:
    release = asyncio.Event()

    async def run() -> None:
        serving = Serving(("m",))
        app = create_app(serving)

        async def with_busy(scope: dict, receive: Callable, send: Callable) -> None:
            if scope["path"] == "/busy":
                await release.wait()
                await answer_at_once(scope, receive, send)
            else:
                await app(scope, receive, send)

        table = Connections(1, 0)
        async with listening(with_busy, table) as port, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{port}"
            busy = asyncio.create_task(client.get(f"{url}/busy"))
            while not len(table) or table._waiting:
                await asyncio.sleep(0.01)
            for _ in range(2):
                async with httpx.AsyncClient() as other:
                    assert (await other.get(f"{url}/livez")).status_code == 200
                    refused = await other.get(f"{url}/version")
                    assert is_openai_error(refused, 503)["type"] == "server_error"
                    assert refused.headers["connection"] == "close"
                    assert refused.headers["retry-after"] == "1"
            release.set()
            assert (await busy).status_code == 200
            async with httpx.AsyncClient() as other:
                assert (await other.get(f"{url}/version")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"\x00\x01\x02 nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000,
    ],
)
def test_what_is_no_http_is_answered_as_a_bad_request(
    server: ServerProcess, request_: bytes
) -> None:
    head, _, body = raw(server, request_ + b"\r\n" * 9).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), head
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head), head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_nonsense_after_the_answer_ends_the_connection_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        async with listening(answer_at_once) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"ok"), 5)
            writer.write(b"nonsense\r\n\r\n")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.close()

    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_reader_that_is_cut_is_one_line_and_its_connection_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nibble")
    monkeypatch.setattr(sse, "SEND_TIMEOUT_SECONDS", 0.3)
    heard: list[bool] = []

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        class Flood(Source):
            async def events(self) -> None:
                while True:
                    self.push(b"data: %0250d\n\n" % 0 * 1000, False)
                    await asyncio.sleep(0)

        await sse.EventStream(Flood(0, 0), heard.append)(scope, receive, send)

    async def run() -> None:
        table = Connections(10, 0)
        async with listening(app, table) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not heard:
                await asyncio.sleep(0.01)
            async with asyncio.timeout(1):
                while len(table):
                    await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(run())
    assert heard == [True]
    lines = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert [record.levelname for record in lines] == ["INFO"], caplog.text
    assert "was cut" in lines[0].getMessage()


def test_a_client_that_leaves_before_its_body_is_whole_is_no_error(
    server: ServerProcess, http: httpx.Client
) -> None:
    before = len(server.log.read_text())
    host, port = server.url.removeprefix("http://").split(":")
    key = http.headers["authorization"].encode()
    for _ in range(3):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 99\r\nAuthorization: " + key + b"\r\n\r\n{"
            )
            time.sleep(0.1)
    assert http.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()[before:]


# The log


def test_what_is_said_again_and_again_is_told_once_a_second_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "REPEAT_SECONDS", 0.2)
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    handler.addFilter(logs.Repeats(handler))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    for i in range(1000):
        logger.error("connection %d failed", i)
        if i % 500 == 0:
            logger.info("news %d", i)
            logger.error("another thing")
    time.sleep(0.7)
    assert lines[:3] == ["connection 0 failed", "news 0", "another thing"]
    assert "news 500" in lines
    assert lines.count("connection 0 failed (and 999 times more)") == 1
    assert lines.count("another thing (and 1 times more)") == 1 and len(lines) == 6
    logger.error("connection %d failed", 1000)
    assert lines[-1] == "connection 1000 failed"


# A real server with few descriptors


def test_health_is_answered_with_more_slow_connections_than_descriptors(
    tiny_llama: Path, start_server: Callable[..., ServerProcess]
) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128));"
    code = limit + "import sys; from nibble.cli import main; sys.exit(main(sys.argv[1:]))"
    server = start_server(
        tiny_llama, "--dtype", "float32", "--kv-cache-memory", "16MiB", code=code
    ).wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    slow = []
    for i in range(300):
        sock = socket.create_connection((host, int(port)), timeout=5)
        body = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nx"
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nX: " if i % 2 else body)
        slow.append(sock)
        if i % 60 == 59:
            assert httpx.get(f"{server.url}/health", timeout=2).status_code == 200
    assert server.log.read_text().count("\n") < 60
    for sock in slow:
        sock.close()
    assert httpx.get(f"{server.url}/v1/models", timeout=2).status_code == 200
    server.process.kill()


def test_more_connections_than_descriptors_is_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nibble", "serve", str(tmp_path), "--max-connections", "999"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ulimit -n" in done.stderr
