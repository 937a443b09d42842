"""What is typed in `nibble chat`: with a model that repeats, and in a real terminal with a real server."""

import asyncio
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from nibble.tools.conversation import Conversation

from ..server.conftest import KEY, ServerProcess, server, start_server  # noqa: F401


class Echo:
    """Says how many messages it was given, and the last."""

    num_tokens, model = 3, "echo"

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def reply(self, messages: list[dict[str, str]]) -> AsyncGenerator[str, None]:
        for piece in (f"{len(messages)} ", messages[0]["content"], " ", messages[-1]["content"]):
            yield piece


@pytest.fixture
def talk() -> Iterator[Conversation]:
    with asyncio.Runner() as runner:
        yield Conversation(runner, Echo(), "be brief")


def test_messages_add_up_and_commands_change_them(
    talk: Conversation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    talk.take("one")
    talk.take("two")
    assert capsys.readouterr().out == "2 be brief one\n4 be brief two\n"
    talk.take("/retry")
    assert capsys.readouterr().out == "4 be brief two\n" and len(talk.messages) == 4
    talk.take("/system be long")
    talk.take("/retry")
    assert capsys.readouterr().out == "4 be long two\n"
    talk.take(f"/save {tmp_path / 'kept.json'}")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [m["role"] for m in kept] == ["system", "user", "assistant", "user", "assistant"]
    talk.take("/clear")
    talk.take("/retry")
    talk.take("three")
    said = capsys.readouterr()
    assert said.out == "2 be long three\n" and "nothing was said yet" in said.err


def test_what_is_told_goes_beside_the_answers(
    talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("/help", "/model", "/speed", "a", "/speed", "b", "/nonsense", "/save /no/where"):
        talk.take(line)
    said = capsys.readouterr()
    assert said.out == "2 be brief a\n4 be brief b\n"
    for told in ("/retry ", "echo", "speed is not told", "there is no /nonsense", "not saved"):
        assert told in said.err
    assert said.err.count("tokens/s") == 1


def test_in_a_terminal(server: ServerProcess, tmp_path: Path) -> None:  # noqa: F811
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nibble", "chat", "--url", server.url, "--api-key", KEY]
    with subprocess.Popen(
        [*command, "--max-tokens", "4"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
    ) as process:  # fmt: skip
        os.close(theirs)
        _converse_in(ours, process)
    assert "+first\n+second\n" in (tmp_path / ".cache/nibble/chat_history").read_text()


def _converse_in(ours: int, process: "subprocess.Popen[bytes]") -> None:
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 30)[0], seen
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    wait_for(">")
    os.write(ours, b"first\x1b\rsecond\r")  # Alt-Enter breaks the line
    wait_for("tokens/s")
    os.write(ours, b"/model\r")
    wait_for("tiny")
    os.write(ours, b"/exit\r")
    assert process.wait(timeout=20) == 0
    os.close(ours)
