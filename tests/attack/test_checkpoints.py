"""Damaged checkpoints: one line and exit code 2, soon; or served, and then chats are answered, soon, by whatever."""

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from . import clients, models
from .conftest import SERVE, Record
from .damage import DAMAGES
from .harness import Server, end, start, wait_for
from .results import Result

SECONDS = 30.0  # to say what is wrong, or to be ready: imports of torch on a busy machine included
ANSWER = 30.0
CHAT = {"model": "target", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}


def damaged(model: Path, folder: Path, name: str) -> Result:
    """Serve a copy of the model that is damaged so."""
    damage = DAMAGES[name]
    broken = models.copy(model, folder / "model")
    damage.make(broken)
    server = start(broken, folder / "run", *SERVE, "--prepared-cache", "none")
    begin = time.monotonic()
    try:
        wait_for(lambda: server.process.poll() is not None or _is_ready(server), SECONDS)
        took, code = time.monotonic() - begin, server.process.poll()
        ready = code is None and _is_ready(server)
        figure, fine = _served(server) if ready else _refused(server, broken, code)
    finally:
        end(server)
    fine = fine and not (ready and damage.must_be_refused)
    ran = (broken / "RAN").exists()
    return Result(
        name,
        f"{figure} after {took:.0f} s{', and its code ran' if ran else ''}",
        ("" if damage.must_be_refused else "served, or ") + "exit code 2 and one line",
        fine and not ran,
    )


def _is_ready(server: Server) -> bool:
    return server.get("/readyz").status_code == 200


def _refused(server: Server, model: Path, code: int | None) -> tuple[str, bool]:
    if code is None:
        return "neither ready nor ended", False
    text = server.log_text().strip().replace(f"{model}/", "").replace(str(model), "MODEL")
    last = text.rpartition("\n")[2]
    if "Traceback" in text or "panicked" in text:
        return f"exit code {code}, a traceback ({last[:80]})", False
    return f"exit code {code}: {last[:120]}", code == 2 and last.startswith("error: ")


def _served(server: Server) -> tuple[str, bool]:
    """Chats and completions are answered, if only by an error; /health is not kept waiting for them."""
    chat = asyncio.run(clients.post(server.port, "/v1/chat/completions", CHAT, timeout=ANSWER))
    text = asyncio.run(
        clients.post(server.port, "/v1/completions", clients.completion(), timeout=ANSWER)
    )
    said = server.complaint()
    fine = (
        chat.status in (200, 400)
        and text.status in (200, 400)
        and chat.seconds < ANSWER / 2
        and server.get("/health", 2).status_code == 200
        and not said
    )
    return (
        f"served: chat {chat.status} in {chat.seconds:.1f} s, completion {text.status}{said}",
        fine,
    )


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(record: Record, tiny: Path, tmp_path: Path, name: str) -> None:
    record(damaged(tiny, tmp_path, name))
    shutil.rmtree(tmp_path)
