"""The watchdog against real engine processes: what hangs is found, what merely takes long is left alone."""

import asyncio
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from nibble.engine import watchdog
from nibble.engine.client import AsyncEngine
from nibble.engine.sampling_params import SamplingParams
from nibble.engine.watchdog import cpu_seconds, until_stuck

from .test_client import collect, with_engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def first(model: str, timeout: float, work: bool = True, stop: bool = False) -> str:
    """What comes first with an engine of this kind: "stuck", "answered", or neither in three seconds."""
    told: list[str] = []

    async def test(engine: AsyncEngine) -> None:
        request = asyncio.create_task(collect(engine, "a", [1], ONE) if work else asyncio.sleep(99))
        if stop:
            os.kill(engine.pid, signal.SIGSTOP)
        watch = asyncio.create_task(until_stuck(engine, timeout))
        await asyncio.wait(
            {watch, request}, timeout=None if work else 3, return_when=asyncio.FIRST_COMPLETED
        )
        told.append("stuck" if watch.done() else "answered" if request.done() else "neither")
        if watch.done():
            assert watch.result() >= 0.9 * timeout
            engine.kill()
            await engine.dead.wait()
        watch.cancel()
        request.cancel()
        await asyncio.gather(watch, request, return_exceptions=True)

    with_engine(test, model)
    return told[0]


def test_an_idle_engine_answers() -> None:
    assert first("good", 0.5, work=False) == "neither"


def test_an_idle_engine_that_is_stopped_is_stuck() -> None:
    assert first("good", 0.5, work=False, stop=True) == "stuck"


def test_a_step_that_hangs_is_stuck() -> None:
    assert first("hangs", 0.5) == "stuck"


def test_a_step_that_computes_may_take_longer() -> None:
    assert first("computes", 0.5) == "answered"


def test_a_step_that_computes_for_ever_is_stuck_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LONG_STEP", 1.5)
    assert first("computes", 0.5) == "stuck"


class Silent:
    """An engine of which nothing is heard; its process is this one."""

    pid, messages_heard = os.getpid(), 0

    def __init__(self) -> None:
        self.pings = 0

    def ping(self) -> None:
        self.pings += 1


def test_time_that_this_process_did_not_have_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Suspended with the engine for a day, it must not kill it when both wake up."""
    monkeypatch.setattr(watchdog, "cpu_seconds", lambda _: 0.0)
    woken = False
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 86400 * woken)
    monkeypatch.setattr(watchdog, "time", clock)

    async def run() -> None:
        nonlocal woken
        engine = Silent()
        watch = asyncio.create_task(until_stuck(engine, 1.0))
        await asyncio.sleep(0.1)
        woken = True
        await asyncio.sleep(0.2)
        assert (not watch.done() and engine.pings == 0) or engine.pings == 1
        assert not watch.done()
        assert await asyncio.wait_for(watch, 5) < 2 and engine.pings == 1

    asyncio.run(run())


def test_cpu_time_is_the_kernels() -> None:
    before = cpu_seconds(os.getpid())
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    after = cpu_seconds(os.getpid())
    assert before is not None and after is not None and 0.05 <= after - before < 5
    assert cpu_seconds(2**30) is None
