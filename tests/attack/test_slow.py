"""Clients that take their time, at either end of a connection, and floods of heads and of connections: they are cut,
nobody else waits for them, and they cost neither memory nor the log."""

import asyncio
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

from . import clients
from .clients import Connection, completion, request
from .conftest import SERVE, Record
from .harness import KEY, Server, serving, wait_for, watched
from .results import Result

READ_LIMIT = 45.0  # 30 s in one send, after what the kernel's buffers take
HEAD_LIMIT, BODY_LIMIT = (
    35.0,
    65.0,
)  # 30 s for a head, 60 s for a body, and what a busy machine needs
MEGABYTE = 1 << 20


async def _first_token(port: int) -> float:
    """Median of the seconds to the first token, of 40 clients one after the other."""
    return statistics.median([(await clients.stream(port, 8, f"{i} ")).first for i in range(40)])


# A stream that begins with more than the kernel takes for a reader who is late: the prompt with its alternatives.
LONG = completion([65] * 4000, 100, stream=True, echo=True, logprobs=20)


async def _read(port: int) -> None:
    await clients.post(port, "/v1/completions", LONG)


async def _never_read(port: int) -> None:
    """Ask, and keep the connection without reading from it."""
    async with Connection(port, receive_buffer=1) as connection:
        await connection.send(request("POST", "/v1/completions", json.dumps(LONG).encode()))
        await asyncio.Event().wait()


async def _beside(
    port: int, clients_of: Callable[[int], Coroutine], count: int
) -> tuple[float, list]:
    """The time to the first token beside so many of these clients, which go on."""
    others = [asyncio.ensure_future(clients_of(port)) for _ in range(count)]
    await asyncio.sleep(3)
    return await _first_token(port), others


async def _end(tasks: list) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def slow_readers(server: Server, count: int) -> Result:
    """Clients that ask for long streams and do not read them: they are cut, and others wait for them no longer than for
    as many who read."""

    async def attack() -> tuple[float, float, int]:
        normal, readers = await _beside(server.port, _read, count)
        await asyncio.gather(*readers)
        await asyncio.to_thread(server.seconds_to_idle)
        before, open_before, most = server.memory(), server.descriptors() + 1, 0

        def are_cut() -> bool:
            nonlocal most
            most = max(most, server.memory() - before)
            return server.descriptors() <= open_before and server.is_idle()

        start = time.monotonic()
        slow, readers = await _beside(server.port, _never_read, count)
        cut = await asyncio.to_thread(wait_for, are_cut, READ_LIMIT)
        seconds = time.monotonic() - start if cut else float("inf")
        await _end(readers)
        return slow / normal, seconds, most

    server.complete()
    ratio, seconds, grown = asyncio.run(attack())
    said = server.complaint()
    return Result(
        f"{count} readers who do not read",
        f"cut after {seconds:.0f} s, others' first token x{ratio:.2f}, {grown / MEGABYTE:+.0f} MB{said}",
        f"after 30 to {READ_LIMIT:g} s, x1.5, +50 MB, no traceback",
        29 < seconds < READ_LIMIT and ratio < 1.5 and grown < 50 * MEGABYTE and not said,
    )


def _unfinished(method: str, path: str, key: str | None = KEY) -> tuple[bytes, float]:
    """The beginning of a request whose body is long, on a connection that is to be kept."""
    return request(method, path, key=key, length=100_000, connection="keep-alive"), BODY_LIMIT


SLOW = {  # what is sent at once, before the rest comes byte by byte, and the limit
    "a head": (b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", HEAD_LIMIT),
    "a connection that says nothing": (b"", HEAD_LIMIT),
    "a body of chat": _unfinished("POST", "/v1/chat/completions"),
    "a body without a key": _unfinished("POST", "/v1/chat/completions", None),
    "a body of /health": _unfinished("POST", "/health"),
    "a body of GET /health": _unfinished("GET", "/health"),
    "a body of an unknown path": _unfinished("POST", "/unknown"),
    "a body of GET /v1/models": _unfinished("GET", "/v1/models"),
}


def slow_writers(server: Server, each: int) -> list[Result]:
    """Every kind of SLOW at once, `each` times, a byte a second; how long the server lets them."""

    async def one(start: bytes, limit: float) -> float:
        async with Connection(server.port) as connection:
            await connection.send(start)
            return await connection.seconds_until_closed(limit, b"x" if start else b"")

    async def attack() -> list[list[float]]:
        kinds = (asyncio.gather(*(one(*kind) for _ in range(each))) for kind in SLOW.values())
        return await asyncio.gather(*kinds)

    with watched(server) as health:
        seconds = asyncio.run(attack())
    rows = [
        Result(
            f"{each} x {name}, byte by byte",
            _closed(taken),
            f"closed in {limit:g} s",
            max(taken) <= limit,
        )
        for (name, (_, limit)), taken in zip(SLOW.items(), seconds, strict=True)
    ]
    return [*rows, Result("meanwhile", str(health), "/health 0.2 s", health.worst < 0.2)]


def _closed(seconds: list[float]) -> str:
    open_ = sum(second == float("inf") for second in seconds)
    return (
        f"{open_} of {len(seconds)} still open" if open_ else f"closed after {max(seconds):.0f} s"
    )


def header_flood(server: Server, size: int) -> Result:
    """One header of `size` bytes: refused or reset, and not kept."""
    server.complete()
    before = server.memory()
    answer = asyncio.run(
        clients.ask(server.port, request("GET", "/v1/models", b"", "X: " + "y" * size), 30)
    )
    grown = (server.memory() - before) / MEGABYTE
    said = f"status {answer.status}" if answer.status else "reset"
    return Result(
        f"a header of {size // MEGABYTE} MiB",
        f"{said} after {answer.seconds:.1f} s, {grown:+.0f} MB",
        "4xx or reset, +10 MB",
        (400 <= answer.status < 500 or not answer.status) and answer.seconds < 30 and grown < 10,
    )


def header_floods(server: Server, count: int) -> Result:
    """Connections that send headers without an end, as fast as they are taken."""

    async def one() -> float:
        async with Connection(server.port) as connection:
            await connection.send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            return await connection.seconds_until_closed(HEAD_LIMIT, b"X-Y: z\r\n" * 100, 0.01)

    async def attack() -> list[float]:
        return await asyncio.gather(*(one() for _ in range(count)))

    server.complete()
    before = server.memory()
    with watched(server) as health:
        seconds = asyncio.run(attack())
    grown = (server.memory() - before) / MEGABYTE
    return Result(
        f"{count} x headers without an end",
        f"{_closed(seconds)}, {health}, {grown:+.0f} MB",
        f"closed in {HEAD_LIMIT:g} s, /health 1 s, +50 MB",
        max(seconds) < HEAD_LIMIT and health.worst < 1 and grown < 50,
    )


def descriptor_exhaustion(server: Server, count: int, seconds: float) -> Result:
    """More connections without a key than the server has descriptors, held with bodies that never end."""

    async def one() -> None:
        with contextlib.suppress(ConnectionError):
            async with Connection(server.port) as connection:
                await connection.send(_unfinished("POST", "/health", None)[0])
                await connection.seconds_until_closed(seconds, b"x")

    async def attack() -> None:
        await asyncio.gather(*(one() for _ in range(count)))

    lines = server.log_text().count("\n")
    with watched(server) as health:
        asyncio.run(attack())
    lines = server.log_text().count("\n") - lines
    works = server.get("/readyz").status_code == 200 and len(server.complete()["choices"]) == 1
    return Result(
        f"256 descriptors, {count} connections held for {seconds:g} s",
        f"{health}, {lines} lines of log, {'serves on' if works else 'serves no more'}",
        "/health 1 s, 100 lines, serves on",
        health.worst < 1 and lines < 100 and works,
    )


def test_slow_readers(record: Record, server: Server) -> None:
    record(slow_readers(server, 20))


def test_slow_writers(record: Record, server: Server) -> None:
    record(*slow_writers(server, 5))


def test_a_header_of_20_mib(record: Record, server: Server) -> None:
    record(header_flood(server, 20 * MEGABYTE))


def test_header_floods(record: Record, server: Server) -> None:
    record(header_floods(server, 50))


def test_descriptor_exhaustion(record: Record, tiny: Path, tmp_path: Path, quick: bool) -> None:
    with serving(tiny, tmp_path, *SERVE, limits={resource.RLIMIT_NOFILE: 256}) as small:
        record(descriptor_exhaustion(small, 300, 20 if quick else 75))
