"""A soak: hours of a mixed day in minutes. After the warm-up memory, descriptors and threads are flat."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

from . import clients
from .clients import Connection, completion, request
from .conftest import Record
from .harness import Server, serving
from .results import Result

CLIENTS = 4
CANCELLED = 0.2  # of the requests
MALFORMED = 0.05
SAMPLES = 60
WARM_UP = 1 / 6  # of the time
# A KV cache that is soon full: on a CPU its memory is taken as it fills.
FLAGS = ("--kv-cache-memory", "4MiB", "--max-num-seqs", "16", "--max-model-len", "2048")
BUSY_SECONDS = 15
FILLING = 40  # prompts of 1000 tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """The server between two rounds of requests, when nobody is there."""

    minutes: float
    megabytes: float
    descriptors: int
    threads: int


@dataclass(slots=True)
class Count:
    answered: int = 0
    cancelled: int = 0
    refused: int = 0
    wrong: int = 0


async def _one(port: int, draw: random.Random, count: Count) -> None:
    """One request of a mixed day."""
    kind, text = draw.random(), "abc " * draw.randrange(1, 60) + str(draw.random())
    ids = [draw.randrange(256) for _ in range(draw.randrange(3, 250))]
    prompt = draw.choice([text, ids])
    body = completion(prompt, draw.randrange(1, 60), stream=draw.random() < 0.7, n=draw.choice([1, 1, 1, 3]),
                      temperature=draw.choice([0, 1]), logprobs=draw.choice([None, None, 5]))  # fmt: skip
    if kind < CANCELLED:
        async with Connection(port) as connection:
            data = json.dumps(body | {"max_tokens": 500}).encode()
            await connection.send(request("POST", "/v1/completions", data))
            await asyncio.sleep(draw.random() * 0.3)
        count.cancelled += 1
    elif kind < CANCELLED + MALFORMED:
        answer = await clients.post(port, "/v1/completions", body | {"temperature": "hot"})
        count.refused += answer.status == 400
        count.wrong += answer.status != 400
    else:
        if draw.random() < 0.3:
            messages = [{"role": "user", "content": text}]
            chat = {"model": body["model"], "messages": messages, "max_tokens": 8, "stream": True}
            answer = await clients.post(port, "/v1/chat/completions", chat)
        else:
            answer = await clients.post(port, "/v1/completions", body)
        whole = answer.status == 200 and (answer.is_whole_stream or answer.json() is not None)
        count.answered += whole
        count.wrong += not whole


async def _round(
    port: int, seconds: float, draw: random.Random, count: Count, clients: int = CLIENTS
) -> None:
    until = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until:
            await _one(port, draw, count)

    await asyncio.gather(*(client() for _ in range(clients)))


def soak(server: Server, minutes: float) -> list[Result]:
    """Rounds of requests and, between them, a look at the idle server."""
    draw, count, samples = random.Random(0), Count(), []
    for _ in range(FILLING):
        server.complete([draw.randrange(256) for _ in range(1000)], 1)
    # More at once than the soak ever has: else its memory grows as chance brings more together.
    asyncio.run(_round(server.port, BUSY_SECONDS, draw, Count(), 4 * CLIENTS))
    begin = time.monotonic()
    while (now := (time.monotonic() - begin) / 60) < minutes:
        asyncio.run(_round(server.port, 60 * minutes / SAMPLES, draw, count))
        idle = server.seconds_to_idle(10)
        if idle == float("inf"):
            return [Result("a soak", "not idle between two rounds", "idle in 10 s", False)]
        time.sleep(0.2)
        samples.append(Sample(now, server.memory() / 2**20, server.descriptors(), server.threads()))
    return _judged(minutes, count, [s for s in samples if s.minutes >= minutes * WARM_UP])


def _judged(minutes: float, count: Count, samples: list[Sample]) -> list[Result]:
    memory = [s.megabytes for s in samples]
    slope = _slope([s.minutes for s in samples], memory)
    grown = 100 * (memory[-1] / memory[0] - 1)
    too_short = minutes < 3  # for a slope to say anything
    attack = f"{minutes:g} minutes, {CLIENTS} clients, {CANCELLED:.0%} cancelled"
    return [
        Result(
            attack,
            f"{count.answered} answered, {count.cancelled} cancelled, {count.refused} refused, {count.wrong} wrong",
            "0 wrong",
            not count.wrong and count.answered > 0,
        ),
        Result(
            "its memory after the warm-up",
            f"{memory[0]:.1f} -> {memory[-1]:.1f} MB, {slope:+.2f} MB/min",
            "+5 %" if too_short else "+5 %, 1 MB/min",
            grown <= 5 and (slope <= 1 or too_short),
        ),
        *(
            Result(
                f"its {name}",
                f"{min(values)} to {max(values)}",
                "within 2 at the end",
                abs(values[-1] - values[0]) <= 2,
            )
            for name, values in (
                ("descriptors", [s.descriptors for s in samples]),
                ("threads", [s.threads for s in samples]),
            )
        ),
    ]


def _slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (spread or 1.0)


def test_soak(record: Record, tiny: Path, tmp_path: Path, soak_minutes: float) -> None:
    with serving(tiny, tmp_path, *FLAGS) as server:
        record(*soak(server, soak_minutes))
