"""Chat templates in a process of their own: what they cost when they overrun, and who pays."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nibble.engine.text.chat_template import ChatFormat, ChatRenderer, Conversation
from nibble.engine.text.renderer import Renderer, RendererBusyError, RendererClosedError

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% set c = messages[0].content %}"
    "{% if c == 'loop' %}" + LOOP + "{% elif c == 'slow' %}"
    "{% for i in range(999) %}{% for j in range(99) %}{% endfor %}{% endfor %}"
    "{% elif c == 'memory' %}{{ c * 10**10 }}"
    "{% elif c == 'output' %}{% for i in range(99) %}{{ c * 10**6 }}{% endfor %}"
    "{% elif c == 'refuse' %}{{ raise_exception('no ' * 10**6) }}{% endif %}"
    "{{ bos_token }}{{ c }}{{ language }}"
)
FORMAT = ChatFormat({"default": TEMPLATE}, {"bos_token": "<s>"}, ["<s>"])


def say(content: str, **fields) -> Conversation:
    return Conversation([{"role": "user", "content": content}], **fields)


def run(
    work: Callable[[Renderer], Awaitable], chat_format: ChatFormat = FORMAT, waiting: int = 9
) -> None:
    async def main() -> None:
        renderer = Renderer(chat_format, waiting)
        renderer.start()
        try:
            await work(renderer)
        finally:
            renderer.close()

    asyncio.run(main())


def pid(renderer: Renderer) -> int:
    return renderer._process._popen.pid


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_it_renders_what_is_rendered_in_process() -> None:
    async def work(renderer: Renderer) -> None:
        for conversation in (say("é <s>"), say("a", variables={"language": "b"}), say("x" * 10**6)):
            assert await renderer.render(conversation) == ChatRenderer(FORMAT).render(conversation)
        assert await asyncio.gather(*(renderer.render(say(str(i))) for i in range(8))) == [
            f"<s>{i}" for i in range(8)
        ]

    run(work)


@pytest.mark.parametrize(
    ("content", "said", "survives"),
    [
        ("loop", "took more than 2 s", False),
        ("memory", "needs more than 512 MiB", False),
        ("output", "more than 33554432 characters", True),
        ("refuse", "cannot render these messages: no no", True),
    ],
)
def test_an_overrun_costs_that_conversation_alone(content: str, said: str, survives: bool) -> None:
    async def work(renderer: Renderer) -> None:
        await renderer.render(say("warm"))
        before = pid(renderer)
        bad, good = await asyncio.gather(
            renderer.render(say(content)), renderer.render(say("x")), return_exceptions=True
        )
        assert isinstance(bad, ValueError) and said in str(bad) and len(str(bad)) < 1000
        assert good == "<s>x"
        assert (pid(renderer) == before) is survives and is_gone(before) is not survives

    run(work)


def test_a_caller_that_leaves_gives_up_its_turn() -> None:
    async def work(renderer: Renderer) -> None:
        tasks = [asyncio.create_task(renderer.render(say(c))) for c in ("slow", "loop", "x")]
        await asyncio.sleep(0)
        before = pid(renderer)
        tasks[1].cancel()
        assert await tasks[0] == "<s>slow" and await tasks[2] == "<s>x"
        assert pid(renderer) == before  # `loop` would have ended it

    run(work)


def test_one_who_leaves_while_his_is_rendered_holds_up_nobody() -> None:
    async def work(renderer: Renderer) -> None:
        first = asyncio.create_task(renderer.render(say("slow")))
        await asyncio.sleep(0)
        first.cancel()
        assert await renderer.render(say("x")) == "<s>x"

    run(work)


def test_the_queue_is_bounded() -> None:
    async def work(renderer: Renderer) -> None:
        tasks = [asyncio.create_task(renderer.render(say("x"))) for _ in range(4)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[:3] == ["<s>x"] * 3 and isinstance(done[3], RendererBusyError)

    run(work, waiting=2)


def test_a_process_that_dies_is_replaced_and_signals_are_the_parents() -> None:
    async def work(renderer: Renderer) -> None:
        await renderer.render(say("warm"))
        process = pid(renderer)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process, number)
        assert await renderer.render(say("x")) == "<s>x" and pid(renderer) == process
        os.kill(process, signal.SIGKILL)
        while renderer._process is not None:
            await asyncio.sleep(0.01)
        assert await renderer.render(say("y")) == "<s>y"

    run(work)


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ messages | no_such }}"])
def test_a_template_that_is_none_is_said_at_once(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(renderer: Renderer) -> None:
        with pytest.raises(ValueError, match="no valid Jinja: line 1"):
            await renderer.render(say("x"))

    run(work, ChatFormat({"default": source}, {}))
    assert "no valid Jinja: line 1" in caplog.text


def test_a_template_that_overruns_while_it_is_compiled() -> None:
    """Constants are folded then."""

    async def work(renderer: Renderer) -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="MiB of memory"):
                await renderer.render(say("x"))

    run(work, ChatFormat({"default": "{{ 'x' * 10**10 }}"}, {}))


def test_after_close_everybody_hears_of_it() -> None:
    async def work(renderer: Renderer) -> None:
        tasks = [asyncio.create_task(renderer.render(say(c))) for c in ("loop", "x")]
        await asyncio.sleep(0.01)
        process = pid(renderer)
        renderer.close()
        done = await asyncio.gather(*tasks, renderer.render(say("y")), return_exceptions=True)
        assert [type(result) for result in done] == [RendererClosedError] * 3 and is_gone(process)

    run(work)


def test_no_template_needs_no_process() -> None:
    async def work(renderer: Renderer) -> None:
        assert renderer._process is None
        with pytest.raises(ValueError, match="no chat template"):
            await renderer.render(say("x"))

    run(work, ChatFormat({}, {}))


PARENT = """
import asyncio, sys
from nibble.engine.text.chat_template import ChatFormat, Conversation
from nibble.engine.text.renderer import Renderer

async def main():
    renderer = Renderer(ChatFormat({"default": sys.argv[1]}, {}), 9)
    renderer.start()
    print(renderer._process._popen.pid, flush=True)
    await renderer.render(Conversation([]))
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("template", ["idle", LOOP])
def test_it_ends_with_its_parent(template: str) -> None:
    command = [sys.executable, "-c", PARENT, template]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        process = int(parent.stdout.readline())
        time.sleep(0.5)  # until the template runs
        assert not is_gone(process)
        parent.kill()
    wait_for(lambda: is_gone(process))
