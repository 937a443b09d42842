"""Clients as an attacker writes them: raw sockets on asyncio, a connection a request, nothing checked before it goes.

`ask` reads an answer to its end; `Connection` is for who leaves early, reads slowly or never finishes a sentence.
"""

import asyncio
import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from .harness import KEY, NAME

DONE = b"data: [DONE]\n\n"
NO_ANSWER = 0  # in place of a status: the connection ended without one


@dataclass(slots=True)
class Answer:
    """What came back; `first` and `seconds`: from the connection's start to the body's first byte, and to the end."""

    status: int
    headers: dict[str, str]
    body: bytes
    first: float
    seconds: float

    @property
    def is_whole_stream(self) -> bool:
        """Every event came, and none of them is an error."""
        return self.status == 200 and self.body.endswith(DONE) and b'"error":' not in self.body

    def json(self) -> Any:
        """The body, or None where it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def error(self) -> dict | None:
        """The error object if the body has OpenAI's shape: four fields, `code` a string or null."""
        body = self.json()
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
            return None
        return error if isinstance(error["code"], str | None) else None


def completion(prompt: object = "x", max_tokens: int = 8, **fields: object) -> dict[str, object]:
    """A greedy request of exactly so many tokens."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens}
    return body | {"temperature": 0, "ignore_eos": True} | fields


def request(method: str, path: str, body: bytes = b"", *headers: str, key: str | None = KEY,
            length: int | None = None, connection: str = "close") -> bytes:  # fmt: skip
    """The bytes of a request. length: the Content-Length that it claims, the body's own if None."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Connection: {connection}"]
    lines += [f"Authorization: Bearer {key}"] * (key is not None)
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines += [f"Content-Length: {len(body) if length is None else length}"]
    if not any(h.lower().startswith("content-type") for h in headers):
        lines += ["Content-Type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8", "surrogatepass") + body


class Connection:
    """One TCP connection to the server; `async with` closes it."""

    def __init__(self, port: int, receive_buffer: int | None = None):
        """receive_buffer: the bytes that the kernel takes for a reader who is late."""
        self.port = port
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.setblocking(False)
        self.start = time.perf_counter()

    async def __aenter__(self) -> "Connection":
        try:
            await asyncio.get_running_loop().sock_connect(self.sock, ("127.0.0.1", self.port))
        except BaseException:
            self.sock.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Leave with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, size: int = 65536) -> bytes:
        """What has come, b"" at the end, whichever end it is."""
        try:
            return await asyncio.get_running_loop().sock_recv(self.sock, size)
        except ConnectionError:
            return b""

    async def seconds_until_closed(self, timeout: float, trickle: bytes = b"",
                                   every: float = 1.0) -> float:  # fmt: skip
        """When the server closes this connection, in seconds from its start; infinite if not in time. Until then
        `trickle` is sent again and again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                sender = asyncio.ensure_future(self._trickle(trickle, every))
                try:
                    while await self.receive():
                        pass
                    return time.perf_counter() - self.start
                finally:
                    sender.cancel()
                    await asyncio.gather(sender, return_exceptions=True)
        return float("inf")

    async def _trickle(self, data: bytes, every: float) -> None:
        while data:
            await asyncio.sleep(every)
            await self.send(data)


async def ask(port: int, raw: bytes, timeout: float = 300.0) -> Answer:
    """Send those bytes and read to the end. A connection that breaks has given what it gave; one that never ends is
    cut at `timeout`, and has no status."""
    data, first = bytearray(), 0.0
    connection = Connection(port)
    whole = False
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(timeout), connection:
            sending = asyncio.ensure_future(
                connection.send(raw)
            )  # who answers early may not read all
            try:
                while piece := await connection.receive():
                    data += piece
                    if not first and b"\r\n\r\n" in data[:-1]:
                        first = time.perf_counter() - connection.start
                whole = True
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    return _parsed(bytes(data) if whole else b"", first, time.perf_counter() - connection.start)


async def post(port: int, path: str, body: dict, key: str | None = KEY,
               timeout: float = 300.0) -> Answer:  # fmt: skip
    return await ask(port, request("POST", path, json.dumps(body).encode(), key=key), timeout)


async def stream(port: int, max_tokens: int = 8, prompt: object = "x", **fields: object) -> Answer:
    """A streamed completion, read as fast as it comes."""
    body = completion(prompt, max_tokens, stream=True, **fields)
    return await post(port, "/v1/completions", body)


def _parsed(data: bytes, first: float, seconds: float) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    status = int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else NO_ANSWER
    pairs = (line.partition(":") for line in lines[1:])
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = _dechunked(body)
    elif headers.get("content-length", "").isdecimal():
        body = body[: int(headers["content-length"])]  # a second answer may follow
    return Answer(status, headers, body, first, seconds)


def _dechunked(data: bytes) -> bytes:
    body, rest = bytearray(), data
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        body += rest[:count]
        rest = rest[count + 2 :]
    return bytes(body)
