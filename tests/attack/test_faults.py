"""Processes killed and stopped, signals, a request that fails in the middle of a batch: clients hear of it, nothing is
left over, and nobody else's answer changes."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import clients, models
from .clients import Answer
from .conftest import SERVE, Record
from .harness import Server, children, is_gone, serving, wait_for
from .results import Result

ENGINE_TIMEOUT = 5.0  # seconds, as given to the servers that are stopped


class Streams:
    """Open streams in a loop of their own; `asyncio.run(attack(Streams(...)))` with what is done to the server."""

    def __init__(self, server: Server, count: int, max_tokens: int):
        self.server, self.count, self.max_tokens = server, count, max_tokens

    def during(self, fault: Callable[[], object], patience: float) -> tuple[list[Answer], float]:
        """Start them, wait until all are running, do `fault`, and hear the streams out: the answers, and how long the
        last took to end from the fault on."""

        async def attack() -> tuple[list[Answer], float]:
            opened = [
                asyncio.ensure_future(
                    clients.post(
                        self.server.port,
                        "/v1/completions",
                        clients.completion(f"{i} ", self.max_tokens, stream=True),
                        timeout=patience,
                    )
                )
                for i in range(self.count)
            ]
            running = lambda: self.server.metric("num_requests_running") >= self.count  # noqa: E731
            await asyncio.to_thread(wait_for, running, 30)
            await asyncio.to_thread(fault)
            begin = time.monotonic()
            answers = await asyncio.gather(*opened)
            return answers, time.monotonic() - begin

        return asyncio.run(attack())


def _told(answers: list[Answer]) -> int:
    """How many streams ended with an error event and [DONE], or with an answer that is an error."""
    return sum(
        (a.body.endswith(clients.DONE) and b'"server_error"' in a.body) or a.error is not None
        for a in answers
    )


def _exit_code(server: Server, seconds: float) -> int | None:
    """None: it still runs."""
    wait_for(lambda: server.process.poll() is not None, seconds)
    return server.process.poll()


def engine_killed(server: Server, count: int) -> Result:
    engine = server.engine_pid()
    begin = time.monotonic()
    answers, heard = Streams(server, count, 8000).during(
        lambda: os.kill(engine, signal.SIGKILL), 60
    )
    code = _exit_code(server, 20)
    took = time.monotonic() - begin
    said = server.complaint()
    return Result(
        f"kill -9 of the engine, {count} streams",
        f"{_told(answers)} told within {heard:.1f} s, exit code {code} in {took:.0f} s{said}",
        "all told in 5 s, exit code 1, no traceback",
        _told(answers) == count and heard < 5 and code == 1 and not said,
    )


def server_killed(server: Server) -> Result:
    pids = children(server.process.pid)
    begin = time.monotonic()
    server.process.kill()
    gone = wait_for(lambda: all(map(is_gone, pids)), 20)
    took = time.monotonic() - begin
    figure = f"its {len(pids)} children gone after {took:.2f} s" if gone else "a child lives on"
    return Result("kill -9 of the HTTP process", figure, "10 s", gone and took < 10)


def engine_stopped(server: Server, count: int, limit: float) -> Result:
    """SIGSTOP: the process is there and does nothing. Probes and clients must hear of it."""
    engine = server.engine_pid()
    stopped = time.monotonic()

    def stop() -> None:
        nonlocal stopped
        os.kill(engine, signal.SIGSTOP)
        stopped = time.monotonic()

    def is_noticed() -> bool:
        return server.get("/livez", 5).status_code != 200

    noticed: list[float] = []

    def stop_and_watch() -> None:
        stop()
        if wait_for(is_noticed, limit):
            noticed.append(time.monotonic() - stopped)

    answers, _ = Streams(server, count, 8000).during(stop_and_watch, limit + 20)
    code = _exit_code(server, 10)
    when = f"/livez says so after {noticed[0]:.1f} s" if noticed else f"/livez 200 for {limit:g} s"
    return Result(
        f"SIGSTOP of the engine, {count} streams",
        f"{when}, {_told(answers)} told, exit code {code}",
        f"{limit:g} s, all told, exit code 1",
        bool(noticed) and _told(answers) == count and code == 1,
    )


def server_stopped(server: Server, seconds: float) -> Result:
    """SIGSTOP and SIGCONT of the HTTP process: streams go on where they were."""

    def pause() -> None:
        server.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        server.send_signal(signal.SIGCONT)

    answers, _ = Streams(server, 4, 400).during(pause, 120)
    whole = sum(answer.is_whole_stream for answer in answers)
    works = len(server.complete()["choices"]) == 1
    return Result(
        f"the HTTP process stopped for {seconds:g} s, 4 streams",
        f"{whole} whole, {'serves on' if works else 'serves no more'}",
        "all whole, serves on",
        whole == 4 and works,
    )


def drained(server: Server) -> Result:
    """SIGTERM: open streams are finished, new requests told to go elsewhere."""
    late: list[Answer] = []

    def stop() -> None:
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/readyz").status_code != 200, 5)
        late.append(asyncio.run(clients.post(server.port, "/v1/completions", clients.completion())))

    answers, took = Streams(server, 4, 2000).during(stop, 120)
    code = _exit_code(server, 10)
    whole = sum(answer.is_whole_stream for answer in answers)
    told = late[0].status == 503 and "retry-after" in late[0].headers
    return Result(
        "SIGTERM, 4 streams",
        f"{whole} whole after {took:.1f} s, a new request {late[0].status}, exit code {code}",
        "all whole, 503 with Retry-After, exit code 0",
        whole == 4 and told and code == 0,
    )


def cut_off(server: Server) -> Result:
    """SIGTERM where open streams take longer than --shutdown-timeout, 0.5 s."""
    answers, took = Streams(server, 4, 8000).during(lambda: server.send_signal(signal.SIGTERM), 60)
    code = _exit_code(server, 10)
    return Result(
        "SIGTERM, 4 streams longer than the timeout",
        f"{_told(answers)} told after {took:.1f} s, exit code {code}",
        "all told in 5 s, exit code 0",
        _told(answers) == 4 and took < 5 and code == 0,
    )


def forced(server: Server) -> Result:
    """A second signal ends it at once, its engine too."""
    engine = server.engine_pid()

    def twice() -> None:
        server.send_signal(signal.SIGINT)
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)

    _, took = Streams(server, 4, 8000).during(twice, 60)
    code = _exit_code(server, 10)
    return Result(
        "SIGINT twice, 4 streams",
        f"exit code {code} after {took:.1f} s, engine {'gone' if is_gone(engine) else 'alive'}",
        "exit code 130 in 5 s, engine gone",
        code == 130 and took < 5 and wait_for(lambda: is_gone(engine), 5),
    )


OVERFLOWS = 0  # the token after which a logit of `overflowing` is infinite


def overflowing(model: Path, folder: Path) -> Path:
    """The model with a hidden dimension that only one token's embedding has, and an output that is beyond float32 in
    it. Every weight is finite."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(models.copy(model, folder) / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, 0] = 0
    embedding[OVERFLOWS] = 0
    embedding[OVERFLOWS, 0] = 1e4  # beside which nothing counts that the layers add
    head[-1, 0] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_row_fails(model: Path, folder: Path) -> Result:
    """Requests whose logits are not finite, in a batch with others: they fail, the others do not change."""
    flags = (*SERVE, "--no-prefix-caching", "--dtype", "float32")
    with serving(overflowing(model, folder / "model"), folder / "run", *flags) as server:
        good = clients.completion([97, 98, 99], 64)
        bad = clients.completion([97, 98, OVERFLOWS], 64)

        async def together(bodies: list[dict]) -> list[Answer]:
            posts = (clients.post(server.port, "/v1/completions", body) for body in bodies)
            return await asyncio.gather(*posts)

        [alone] = asyncio.run(together([good]))
        answers = asyncio.run(together([good, bad] * 4))
        works = server.get("/health").status_code == 200
    same = sum(a.status == 200 and _text(a) == _text(alone) for a in answers[::2])
    failed = sum(a.status == 500 and a.error is not None for a in answers[1::2])
    return Result(
        "infinite logits in 4 of 8 rows",
        f"{failed} x 500, {same} of the others unchanged",
        "4 x 500, 4 unchanged",
        failed == 4 and same == 4 and works,
    )


def _text(answer: Answer) -> str:
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize("count", [8, 64])
def test_kill_9_of_the_engine(record: Record, tiny: Path, tmp_path: Path, count: int) -> None:
    with serving(tiny, tmp_path, *SERVE) as server:
        record(engine_killed(server, count))


def test_kill_9_of_the_server(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, *SERVE) as server:
        record(server_killed(server))


def test_sigstop_of_the_engine(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, *SERVE, "--engine-timeout", f"{ENGINE_TIMEOUT:g}") as server:
        record(engine_stopped(server, 8, 4 * ENGINE_TIMEOUT))


def test_sigstop_of_the_server(record: Record, server: Server) -> None:
    record(server_stopped(server, 5))


def test_sigterm(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, *SERVE) as server:
        record(drained(server))


def test_sigterm_with_a_short_timeout(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, *SERVE, "--shutdown-timeout", "0.5") as server:
        record(cut_off(server))


def test_a_second_signal(record: Record, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, *SERVE) as server:
        record(forced(server))


def test_one_row_fails(record: Record, tiny_llama: Path, tmp_path: Path) -> None:
    record(one_row_fails(tiny_llama, tmp_path))
