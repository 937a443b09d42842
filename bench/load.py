"""A streaming load generator for OpenAI-compatible servers, small enough to share the cores with the server.

Each client posts `/v1/completions` (prompt as token ids, streaming, temperature 0, ignore_eos), one request after the
other, each on its own connection, and notes when each event arrives. Tokens are counted by the server's own `usage`,
which must equal what was asked for: a server that stops early cannot look fast. Raw asyncio streams, because a general
HTTP client costs several times more CPU per token than the rest of this file.

    time to first token   request sent -> first event with text
    tokens per second     all completion tokens of all clients / first request sent .. last event received
    time per token        (last event - first event) / (tokens - 1) of one request
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 600.0  # seconds for one request


class LoadError(Exception):
    """The server did not do what was asked: its answer is in the message."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One request's times, in seconds of time.perf_counter()."""

    sent: float
    first: float
    last: float
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send, and the model name that the server goes by."""

    host: str
    port: int
    model: str

    @classmethod
    async def at(cls, url: str) -> "Server":
        """Ask the server at `url` what it serves. Raises LoadError or OSError while it is not up."""
        parts = urlsplit(url)
        bare = cls(parts.hostname or "127.0.0.1", parts.port or 80, "")
        body = b"".join([piece async for piece in _exchange(bare, "GET", "/v1/models", None)])
        return cls(bare.host, bare.port, json.loads(body)["data"][0]["id"])


def random_prompts(
    count: int, tokens: int, seed: int, vocab: tuple[int, int] = (1000, 30000)
) -> list[list[int]]:
    """`count` prompts of uniformly random token ids: no two share a prefix, so no cache helps."""
    draw = random.Random(seed)
    return [[draw.randrange(*vocab) for _ in range(tokens)] for _ in range(count)]


async def complete(server: Server, prompt: list[int], max_tokens: int) -> Reply:
    """One streamed completion of exactly `max_tokens` tokens."""
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
    async for event in _events(
        _exchange(server, "POST", "/v1/completions", json.dumps(body).encode())
    ):
        if b'"error"' in event and "error" in (message := json.loads(event)):
            raise LoadError(str(message["error"]))
        if b'"completion_tokens"' in event:  # the last event; before it, `usage` is null or absent
            tokens = json.loads(event)["usage"]["completion_tokens"]
        else:
            last = time.perf_counter()
            first = first or last
    if tokens != max_tokens:
        raise LoadError(f"asked for {max_tokens} tokens with ignore_eos, got {tokens}")
    return Reply(sent, first, last, tokens)


async def run(
    server: Server, prompts: list[list[int]], max_tokens: int, clients: int
) -> dict[str, Any]:
    """Send all prompts, `clients` at a time, and sum up."""
    waiting = iter(prompts)
    replies: list[Reply] = []

    async def client() -> None:
        for prompt in waiting:
            replies.append(await asyncio.wait_for(complete(server, prompt, max_tokens), TIMEOUT))

    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = max(r.last for r in replies) - min(r.sent for r in replies)
    firsts = sorted(r.first - r.sent for r in replies)
    per_token = [(r.last - r.first) / max(r.completion_tokens - 1, 1) for r in replies]
    return {
        "clients": clients,
        "requests": len(replies),
        "prompt_tokens": len(prompts[0]),
        "output_tokens": max_tokens,
        "seconds": round(seconds, 5),
        "tokens_per_second": round(sum(r.completion_tokens for r in replies) / seconds, 1),
        "ttft_ms_median": round(1e3 * statistics.median(firsts), 1),
        "ttft_ms_p99": round(1e3 * firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))], 1),
        "ms_per_output_token_median": round(1e3 * statistics.median(per_token), 2),
    }


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data:` payloads of a server-sent event stream, without the closing [DONE]."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (payload := line[5:].strip()) != b"[DONE]":
                yield payload


async def _exchange(
    server: Server, method: str, path: str, body: bytes | None
) -> AsyncIterator[bytes]:
    """One HTTP/1.1 request on its own connection; the body's pieces as they come (chunked or with a length)."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + (body or b""))
        await writer.drain()
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if status.split()[1] != "200":
            raise LoadError(
                f"{method} {path}: {status}: {(await reader.read(2000)).decode(errors='replace')}"
            )
        headers = {
            name.lower(): value.strip()
            for name, _, value in (field.partition(":") for field in fields)
        }
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
        else:
            yield await reader.read()
    finally:
        writer.close()
