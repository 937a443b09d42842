"""Malformed requests: none is a 5xx, none leaves the server changed, and an error says which field is wrong."""

import asyncio
import socket
from collections import Counter

from .clients import NO_ANSWER, Answer, ask
from .conftest import Record
from .corpus import CLOSED, REFUSED, Case, cases
from .harness import Server
from .results import Result

PATIENCE = 3.0  # seconds that a client waits, who has sent what may be taken for the beginning of something
GROWTH = 200 << 20
AT_ONCE = 4


def malformed(server: Server, every: int = 1) -> list[Result]:
    """The corpus, or each `every`-th case of it, at a server. Counts what came back, and what it cost."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        corpus = cases(canary.getsockname()[1])[::every]
        server.complete()
        before = server.memory()
        answers = asyncio.run(_all(server.port, corpus))
        grown = server.memory() - before
        canary.setblocking(False)
        asked = _was_asked(canary)
    wrong = [f"{c.name}: {w}" for c, a in zip(corpus, answers, strict=True) if (w := _wrong(c, a))]
    print(*wrong, sep="\n")
    kinds = Counter(a.status // 100 for a in answers)
    failed = kinds[5]
    works, said = len(server.complete()["choices"]) == 1, server.complaint()
    counts = f"{len(corpus)} cases: {kinds[2]} x 2xx, {kinds[4]} x 4xx, {failed} x 5xx, {kinds[0]} unanswered{said}"
    shown = "; ".join(wrong[:5])
    return [
        Result(
            "malformed requests",
            counts,
            "0 x 5xx, no traceback, serves on",
            not failed and works and not said,
        ),
        Result(
            "the answers to them",
            f"{len(wrong)} of {len(corpus)} not as owed{': ' + shown if shown else ''}",
            "OpenAI's error with the field's name, a request id",
            not wrong,
        ),
        Result("their cost", f"{grown / 2**20:+.0f} MB", "under 200 MB", grown < GROWTH),
        Result("requests to elsewhere", "1 or more" if asked else "0", "0", not asked),
    ]


async def _all(port: int, corpus: list[Case]) -> list[Answer]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(case: Case) -> Answer:
        async with gate:
            return await ask(port, case.raw, PATIENCE if case.owed == CLOSED else 60.0)

    return await asyncio.gather(*map(one, corpus))


def _was_asked(canary: socket.socket) -> bool:
    try:
        canary.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _wrong(case: Case, answer: Answer) -> str:
    """What the answer lacks; nothing if it is as owed."""
    if answer.status == NO_ANSWER:
        return "" if case.owed == CLOSED else "no answer"
    if answer.status < 400:
        return f"status {answer.status}" if case.owed == REFUSED else ""
    if answer.status >= 500:
        return f"status {answer.status}"
    if case.raw.startswith((b"HEAD", b"CONNECT")):  # whose answers have no body
        return ""
    error = answer.error
    if error is None or "x-request-id" not in answer.headers:
        return f"{answer.status} without an error object or a request id"
    if case.owed != REFUSED:
        return ""
    if answer.status != 400 or not str(error["param"]).startswith(case.field):
        return f"{answer.status} {error['param']}: {error['message'][:80]}"
    return ""


def test_malformed_requests(record: Record, server: Server) -> None:
    record(*malformed(server))


def test_the_corpus_is_large() -> None:
    """Of different cases: one that is sent twice tests nothing."""
    corpus = cases(1)
    assert len({case.raw for case in corpus}) >= 700
