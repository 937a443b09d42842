"""Many clients, and clients that leave: everybody is answered or told when to come again, /health stays quick, and
nothing is left behind."""

import asyncio
import json
import random
import time
from pathlib import Path

import pytest

from . import clients
from .clients import Answer, Connection, completion, request
from .conftest import SERVE, Record
from .harness import Server, serving, watched
from .results import Result

HEALTH = {64: 0.5, 256: 1.0, 1000: 3.0, 2000: 8.0}  # clients -> seconds


async def _streams(port: int, count: int, max_tokens: int) -> list[Answer]:
    return await asyncio.gather(*(clients.stream(port, max_tokens, f"{i} ") for i in range(count)))


def crowd(server: Server, count: int) -> Result:
    """So many streams at once, each on a connection of its own."""
    start = time.perf_counter()
    with watched(server) as health:
        answers = asyncio.run(_streams(server.port, count, 16))
    took, idle = time.perf_counter() - start, server.seconds_to_idle(10)
    whole = sum(answer.is_whole_stream for answer in answers)
    return Result(
        f"{count} streams at once",
        f"{whole} whole in {took:.1f} s, {health}, idle after {idle:.1f} s",
        f"all whole, /health {HEALTH[count]:g} s, idle in 2 s",
        whole == count and health.worst < HEALTH[count] and idle < 2,
    )


async def _leaving(port: int, count: int, seed: int) -> list[bool]:
    """Streams of which every second client leaves at some moment, half of these with RST. Who stays, hears all."""
    draw = random.Random(seed)

    async def leaves(after: float, with_reset: bool) -> bool:
        async with Connection(port) as connection:
            body = json.dumps(completion("x", 2000, stream=True)).encode()
            await connection.send(request("POST", "/v1/completions", body))
            await asyncio.sleep(after)
            if with_reset:
                connection.reset()
        return True

    async def stays(i: int) -> bool:
        return (await clients.stream(port, 16, f"{i} ")).is_whole_stream

    jobs = [leaves(draw.uniform(0, 2), i % 4 == 1) if i % 2 else stays(i) for i in range(count)]
    return await asyncio.gather(*jobs)


def storm(server: Server, count: int, rounds: int) -> Result:
    """Clients that come at once and half of which leave in the middle."""
    server.complete()
    before = server.descriptors()
    kept, idle = 0, 0.0
    for i in range(rounds):
        kept += sum(asyncio.run(_leaving(server.port, count, i)))
        idle = max(idle, server.seconds_to_idle(10))
    left = server.descriptors() - before
    return Result(
        f"{rounds} storms of {count}, half leave midway",
        f"{kept} of {rounds * count} as they should be, idle after {idle:.1f} s, {left:+d} descriptors",
        "all, idle in 2 s, +8 descriptors",
        kept == rounds * count and idle < 2 and left <= 8,
    )


async def _resets(port: int, count: int, seconds: float) -> None:
    raw = request("POST", "/v1/completions", json.dumps(completion("x", 500, stream=True)).encode())
    sent = (b"", raw[:60], raw[:-20], raw)  # nothing, a part of the head, of the body, all

    async def one(i: int) -> None:
        await asyncio.sleep(seconds * i / count)
        async with Connection(port) as connection:
            await connection.send(sent[i % len(sent)])
            connection.reset()

    await asyncio.gather(*map(one, range(count)))


def resets(server: Server, rounds: int) -> Result:
    """Connections that are reset: before, within and after a request."""
    server.complete()
    before = server.descriptors()
    idle = 0.0
    with watched(server) as health:
        for _ in range(rounds):
            asyncio.run(_resets(server.port, 500, 2.0))
            idle = max(idle, server.seconds_to_idle(10))
    left = server.descriptors() - before
    said = server.complaint()
    return Result(
        f"{rounds} x 500 connections opened and reset in 2 s",
        f"idle after {idle:.1f} s, {left:+d} descriptors, {health}{said}",
        "idle in 2 s, +8 descriptors, /health 1 s, no traceback",
        idle < 2 and left <= 8 and health.worst < 1 and not said,
    )


def rounds_of_requests(server: Server, rounds: int) -> Result:
    """200 requests a round, not streamed, after a first round that warms up."""
    sizes = []
    for _ in range(rounds + 1):
        asyncio.run(_whole(server.port, 200))
        server.seconds_to_idle(10)
        sizes.append(server.memory() / 2**20)
    grown = sizes[-1] - sizes[0]
    return Result(
        f"{rounds} rounds of 200 requests",
        f"{sizes[0]:.0f} -> {sizes[-1]:.0f} MB",
        "+10 MB",
        grown < 10,
    )


async def _whole(port: int, count: int) -> list[Answer]:
    body = completion("x", 4)
    return await asyncio.gather(
        *(clients.post(port, "/v1/completions", body) for _ in range(count))
    )


def refusals(server: Server, places: int, count: int) -> Result:
    """More clients than a server has places: each is served whole or told when to come again."""
    answers = asyncio.run(_streams(server.port, count, 200))
    whole = sum(answer.is_whole_stream for answer in answers)
    told = sum(
        a.status == 503 and "retry-after" in a.headers and a.error is not None for a in answers
    )
    return Result(
        f"{count} clients for {places} places",
        f"{whole} served, {told} x 503 with Retry-After, {count - whole - told} otherwise",
        "served or told",
        whole >= places and whole + told == count,
    )


@pytest.mark.parametrize("count", HEALTH)
def test_many_streams(record: Record, server: Server, count: int) -> None:
    record(crowd(server, count))


def test_storms(record: Record, server: Server) -> None:
    record(storm(server, 300, 2))


def test_resets(record: Record, server: Server, quick: bool) -> None:
    record(resets(server, 2 if quick else 5))


def test_rounds(record: Record, server: Server) -> None:
    record(rounds_of_requests(server, 8))


def test_a_full_queue(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(
        tiny, tmp_path, *SERVE, "--max-num-seqs", "8", "--max-queued-requests", "8"
    ) as small:
        record(refusals(small, 16, 100))
