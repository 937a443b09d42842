"""AsyncEngine against a real child process that runs a fake model."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from nibble.engine.client import AsyncEngine, EngineDeadError, child_params
from nibble.engine.config import EngineConfig
from nibble.engine.messages import AddRequest, FrameReader, decode_to_engine, frame
from nibble.engine.sampling_params import SamplingParams
from nibble.errors import UserError

from .scheduling.test_scheduler import solo

COMMAND = (sys.executable, str(Path(__file__).with_name("fakes.py")))
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


async def start(model: str = "good", **config) -> AsyncEngine:
    return await AsyncEngine.start(EngineConfig(model=model, **config), COMMAND)


def with_engine(
    test: Callable[[AsyncEngine], Awaitable[None]], model: str = "good", **config
) -> None:
    """Run `test` with an engine of its own, all within 30 s."""

    async def main() -> None:
        engine = await start(model, **config)
        try:
            await asyncio.wait_for(test(engine), 30)
        finally:
            await engine.shutdown()
        assert not engine.is_alive

    asyncio.run(main())


async def collect(
    engine: AsyncEngine, request_id: str, prompt: list[int], params: SamplingParams
) -> list[int]:
    tokens = []
    async for output in engine.generate(request_id, prompt, params):
        tokens += output.token_ids
    return tokens


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)


def test_many_at_once_each_get_their_own_tokens() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        runs = [collect(engine, str(i), [i, i + 1], params) for i in range(40)]
        assert await asyncio.gather(*runs) == [solo([i, i + 1], 10) for i in range(40)]
        await until(lambda: engine.stats.num_free_blocks == engine.ready.num_blocks)
        assert engine.stats.num_running == engine.stats.num_waiting == 0

    with_engine(test)


def test_ready_is_what_the_runner_said() -> None:
    async def test(engine: AsyncEngine) -> None:
        assert (engine.ready.num_blocks, engine.ready.block_size, engine.ready.device) == (
            64,
            4,
            "fake",
        )
        assert engine.is_alive

    with_engine(test)


def test_leaving_early_aborts() -> None:
    async def test(engine: AsyncEngine) -> None:
        async with aclosing(engine.generate("left", [1], LONG)) as outputs:
            async for _ in outputs:
                break
        task = asyncio.create_task(collect(engine, "cancelled", [1], LONG))
        await until(lambda: engine.stats.num_running == 1)
        task.cancel()
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.num_free_blocks == engine.ready.num_blocks

    with_engine(test, "slow")


def test_abort_from_outside_ends_the_stream() -> None:
    async def test(engine: AsyncEngine) -> None:
        reasons = []
        async for output in engine.generate("a", [1], LONG):
            reasons.append(output.finish_reason)
            engine.abort("a")
        assert reasons[-1] == "abort"
        assert await collect(
            engine, "a", [1], SamplingParams(max_tokens=2, ignore_eos=True)
        ) == solo([1], 2)

    with_engine(test, "slow")


def test_a_request_the_engine_refuses_says_why() -> None:
    async def test(engine: AsyncEngine) -> None:
        outputs = [output async for output in engine.generate("a", list(range(70)), LONG)]
        assert [output.finish_reason for output in outputs] == ["error"]
        assert "no room" in outputs[0].error

    with_engine(test)


def test_one_id_cannot_be_used_twice_at_a_time() -> None:
    async def test(engine: AsyncEngine) -> None:
        first = asyncio.create_task(collect(engine, "a", [1], LONG))
        await until(lambda: engine.stats.num_running == 1)
        with pytest.raises(ValueError, match="already in use"):
            await collect(engine, "a", [1], LONG)
        assert await first == solo([1], 60)

    with_engine(test, "slow")


def test_killing_the_engine_ends_every_stream() -> None:
    async def test(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, str(i), [i], LONG)) for i in range(8)]
        await until(lambda: engine.stats.num_running == 8)
        os.kill(engine.pid, signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
        assert engine.dead.is_set()
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collect(engine, "late", [1], LONG)

    with_engine(test, "slow")


def test_sigint_and_sigterm_are_left_to_the_parent() -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, "a", [1], LONG))
        await until(lambda: engine.stats.num_running == 1)
        os.kill(engine.pid, signal.SIGINT)
        os.kill(engine.pid, signal.SIGTERM)
        assert await task == solo([1], 60)

    with_engine(test, "slow")


def test_shutdown_ends_open_streams_with_abort() -> None:
    async def main() -> None:
        engine = await start("slow")
        reasons = []

        async def stream() -> None:
            async for output in engine.generate("a", [1], LONG):
                reasons.append(output.finish_reason)

        task = asyncio.create_task(stream())
        await until(lambda: bool(reasons))
        await engine.shutdown()
        await task
        assert reasons[-1] == "abort"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("bad-input", UserError, "model.safetensors: is truncated"),
        ("defect", EngineDeadError, "KeyError"),
        ("dies", EngineDeadError, "exit code 9"),
    ],
)
def test_start_up_failures(model: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        asyncio.run(start(model))


def test_no_torch_in_the_client_process() -> None:
    code = "import sys, nibble.engine.client; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_the_engine_dies_with_its_parent() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from nibble.engine.client import AsyncEngine\n"
        "from nibble.engine.config import EngineConfig\n"
        "async def main():\n"
        f"    engine = await AsyncEngine.start(EngineConfig(model='good'), {COMMAND!r})\n"
        "    print(engine.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    asyncio.run(
        until(
            lambda: (
                not Path(f"/proc/{int(parent.stdout)}/cmdline").is_file()
                or not Path(f"/proc/{int(parent.stdout)}/cmdline").read_bytes()
            )
        )
    )


def test_frames_survive_any_cutting() -> None:
    messages = [AddRequest(str(i), list(range(i * 100)), SamplingParams()) for i in range(5)]
    stream = b"".join(frame(message) for message in messages)
    for size in (1, 3, 4, 5, 1000, len(stream)):
        reader = FrameReader()
        bodies = [
            body
            for at in range(0, len(stream), size)
            for body in reader.feed(stream[at : at + size])
        ]
        assert [decode_to_engine(body) for body in bodies] == messages


def test_samples_of_one_seed_differ_and_repeat() -> None:
    params = SamplingParams(seed=42)
    seeds = [child_params(params, i).seed for i in range(8)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 8
    assert seeds == [child_params(params, i).seed for i in range(8)]
    for seed in seeds:
        SamplingParams(seed=seed).verify(10)
    assert child_params(SamplingParams(), 3).seed is None
