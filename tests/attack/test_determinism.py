"""Greedy answers are the same whatever else happens: alone, in a batch, after preemption, from the prefix cache, in
chunks. The same to the last digit of their log-probabilities, where what is compared is one server's."""

import asyncio
import random
from pathlib import Path

import pytest

from . import clients
from .clients import Answer, completion
from .conftest import Record
from .harness import Server, serving
from .results import Result

BATCH = 32
LONG = 48


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of token ids that begin differently, of 3 to 200 tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randrange(3, 200))] for _ in range(count)]


async def _together(port: int, prompts: list[list[int]]) -> list[str]:
    return await asyncio.gather(*(_answer(port, prompt) for prompt in prompts))


async def _alone(port: int, prompts: list[list[int]]) -> list[str]:
    return [await _answer(port, prompt) for prompt in prompts]


async def _answer(port: int, prompt: list[int]) -> str:
    """Tokens and their log-probabilities as the server wrote them."""
    answer: Answer = await clients.post(
        port, "/v1/completions", completion(prompt, LONG, logprobs=2)
    )
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.body[:300]!r}")
    return repr(answer.json()["choices"])


def in_a_batch(server: Server) -> Result:
    prompts = _prompts(BATCH)
    alone = asyncio.run(_alone(server.port, prompts))
    batch = asyncio.run(_together(server.port, prompts))
    return _compared(f"alone and in a batch of {BATCH}", alone, batch, True, "")


def from_the_cache(server: Server) -> Result:
    prompts = [prompt * 2 for prompt in _prompts(8, seed=1)]
    first = asyncio.run(_alone(server.port, prompts))
    before = server.metric("prefix_cache_hits_total")
    second = asyncio.run(_alone(server.port, prompts))
    hits = server.metric("prefix_cache_hits_total") - before
    return _compared(
        "computed and from the prefix cache", first, second, hits > 0, f", {hits:.0f} tokens found"
    )


def after_preemption(roomy: Server, tight: Server) -> Result:
    """tight: a server whose KV cache holds few of the requests that it takes in at once."""
    prompts = [prompt * 3 for prompt in _prompts(16, seed=2)]
    alone = asyncio.run(_alone(roomy.port, prompts))
    before = tight.metric("num_preemptions_total")
    batch = asyncio.run(_together(tight.port, prompts))
    count = tight.metric("num_preemptions_total") - before
    return _compared("alone and preempted", alone, batch, count > 0, f", {count:.0f} preemptions")


def in_chunks(whole: Server, chunked: Server) -> Result:
    """chunked: a server that computes a prompt in many steps."""
    prompts = [prompt * 3 for prompt in _prompts(16, seed=3)]
    first = asyncio.run(_alone(whole.port, prompts))
    second = asyncio.run(_together(chunked.port, prompts))
    return _compared("in one step and in chunks of 16 tokens", first, second, True, "")


def _compared(
    attack: str, first: list[str], second: list[str], happened: bool, more: str
) -> Result:
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    distinct = len(set(first))
    return Result(
        f"greedy, {attack}",
        f"{equal} of {len(first)} equal{more}",
        "all, log-probabilities too",
        equal == len(first) and happened and distinct == len(first),
    )


@pytest.fixture(scope="module")
def roomy(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    with serving(tiny, tmp_path_factory.mktemp("roomy"), "--kv-cache-memory", "32MiB") as started:
        yield started


def test_in_a_batch(record: Record, roomy: Server) -> None:
    record(in_a_batch(roomy))


def test_from_the_cache(record: Record, roomy: Server) -> None:
    record(from_the_cache(roomy))


def test_after_preemption(record: Record, roomy: Server, tiny: Path, tmp_path: Path) -> None:
    flags = ("--kv-cache-memory", "400KiB", "--max-model-len", "1024")
    with serving(tiny, tmp_path, *flags) as tight:
        record(after_preemption(roomy, tight))


def test_in_chunks(record: Record, roomy: Server, tiny: Path, tmp_path: Path) -> None:
    with serving(
        tiny,
        tmp_path,
        "--max-num-batched-tokens",
        "16",
        "--max-num-seqs",
        "16",
        "--kv-cache-memory",
        "32MiB",
    ) as chunked:
        record(in_chunks(roomy, chunked))
