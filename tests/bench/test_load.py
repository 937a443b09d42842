"""The load generator counts what really arrived, however the bytes were cut, and notices a server that cheats."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "load", Path(__file__).parents[2] / "bench" / "load.py"
)
load = importlib.util.module_from_spec(_SPEC)
sys.modules["load"] = load  # dataclasses look their module up there
_SPEC.loader.exec_module(load)


def _event(data: dict) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\r\n\r\n"


async def _stand_in(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    shorten: int = 0,
    piece: int = 7,
    status: str = "200 OK",
) -> None:
    """A server that streams `max_tokens - shorten` tokens, its events cut into chunks of `piece` bytes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if head.startswith("get"):
        body = b'{"data": [{"id": "m"}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    else:
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        tokens = json.loads(await reader.readexactly(length))["max_tokens"] - shorten
        stream = b": ping\r\n\r\n" + _event({"choices": [{"text": "x"}]}) * tokens
        stream += (
            _event({"choices": [], "usage": {"completion_tokens": tokens}})
            + b"data: [DONE]\r\n\r\n"
        )
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for at in range(0, len(stream), piece):
            part = stream[at : at + piece]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


def _against(work, **options):
    async def both():
        server = await asyncio.start_server(lambda r, w: _stand_in(r, w, **options), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await work(await load.Server.at(f"http://127.0.0.1:{port}"))

    return asyncio.run(both())


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_counts_every_token_of_every_client(piece: int) -> None:
    figures = _against(
        lambda s: load.run(s, load.random_prompts(5, 8, seed=0), 10, clients=2), piece=piece
    )
    assert (figures["requests"], figures["output_tokens"], figures["prompt_tokens"]) == (5, 10, 8)
    assert figures["tokens_per_second"] == pytest.approx(50 / figures["seconds"], rel=0.05)
    assert 0 < figures["ttft_ms_median"] <= figures["ttft_ms_p99"]


def test_a_server_that_stops_early_is_an_error() -> None:
    with pytest.raises(load.LoadError, match="asked for 10 tokens with ignore_eos, got 9"):
        _against(lambda s: load.complete(s, [1, 2], 10), shorten=1)


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(load.LoadError, match="503"):
        _against(lambda s: load.complete(s, [1, 2], 10), status="503 Service Unavailable")


def test_prompts_share_no_prefix_and_repeat_with_their_seed() -> None:
    prompts = load.random_prompts(50, 16, seed=3)
    assert prompts == load.random_prompts(50, 16, seed=3)
    assert len({tuple(p[:4]) for p in prompts}) == 50
