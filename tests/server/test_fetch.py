"""Files by URL: from listed hosts alone, bounded in time and bytes, never from within."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nibble.server import fetch as module
from nibble.server.fetch import FetchError, fetch


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["host"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/file")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        count = 3000 if self.path == "/long" else 1
        for _ in range(count):
            self.wfile.write(b"x" * 1000)
            if self.path == "/slow":
                self.server.stopped.wait(5)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stopped = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def get(url: str, *hosts: str) -> bytes:
    return asyncio.run(fetch(url, frozenset(hosts)))


def test_a_listed_address_is_asked(host: ThreadingHTTPServer) -> None:
    at = f"127.0.0.1:{host.server_port}"
    assert get(f"http://{at}/file?a=b#c", at) == b"x" * 1000
    assert host.asked == [("/file?a=b", at)]


@pytest.mark.parametrize(
    ("path", "says"), [("moved", "status 302"), ("none", "status 404"), ("long", "more than")]
)
def test_what_gives_no_file(
    host: ThreadingHTTPServer, path: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10**6)
    at = f"127.0.0.1:{host.server_port}"
    with pytest.raises(FetchError, match=says):
        get(f"http://{at}/{path}", at)
    assert len(host.asked) == 1


def test_what_is_slow(host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    at = f"127.0.0.1:{host.server_port}"
    with pytest.raises(FetchError, match=r"within 0\.3 seconds"):
        get(f"http://{at}/slow", at)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/file",
        "http://LOCALHOST:{port}/file",
        "http://good.example@127.0.0.1:{port}/file",
        "http://127.0.0.1:{port}\\@good.example/file",
        "http://2130706433:{port}/file",
        "http://[::1]:{port}/file",
        "ftp://good.example/file",
        "http:///file",
        "http://good.example:99999/",
        "http://[bad/",
    ],
)
def test_hosts_that_are_not_listed_are_not_asked(host: ThreadingHTTPServer, url: str) -> None:
    with pytest.raises(FetchError):
        get(url.format(port=host.server_port), "good.example")
    assert host.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1"])
def test_a_name_that_leads_within_is_refused(
    host: ThreadingHTTPServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(name: str, port: int, *args: object, **kwargs: object) -> list[object]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        outside = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))
        return [outside, (family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    at = f"good.example:{host.server_port}"
    with pytest.raises(FetchError, match="private network"):
        get(f"http://{at}/file", at)
    assert host.asked == []


def test_a_name_is_looked_up_once_and_told_to_its_host(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def found(name: str, port: int) -> str:
        assert name == "good.example"
        return "127.0.0.1"

    monkeypatch.setattr(module, "_address", found)
    at = f"good.example:{host.server_port}"
    assert get(f"http://{at}/file", at) == b"x" * 1000
    assert host.asked == [("/file", at)]


def test_only_a_port_that_is_listed(host: ThreadingHTTPServer) -> None:
    with pytest.raises(FetchError, match="port"):
        get(f"http://127.0.0.1:{host.server_port}/file", "127.0.0.1")
    assert host.asked == []
