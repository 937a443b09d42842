"""Start, drain, death: what the process does and the exit code it leaves."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from nibble.engine.config import EngineConfig
from nibble.errors import UserError
from nibble.server import lifecycle

from .conftest import KEY, ServerProcess

StartServer = Callable[..., ServerProcess]
SMALL = ("--dtype", "float32", "--kv-cache-memory", "16MiB", "--served-model-name", "tiny")


class Stream(threading.Thread):
    """A streaming client in the background; `body` is what it has received."""

    def __init__(self, server: ServerProcess, max_tokens: int):
        super().__init__(daemon=True)
        self.url, self.body, self.error = f"{server.url}/v1/completions", "", ""
        self.fields = {
            "model": "tiny",
            "prompt": "x",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.fields, timeout=60) as response:
                for text in response.iter_text():
                    self.body += text
                    self.started.set()
        except httpx.HTTPError as error:
            self.error = repr(error)


def complete(server: ServerProcess) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
    )


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_loading_then_full_then_drained(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(
        tiny_llama,
        *SMALL,
        "--max-num-seqs",
        "1",
        "--max-queued-requests",
        "1",
        "--shutdown-timeout",
        "120",
    )

    def is_open() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{server.url}/livez").status_code == 200
        return False

    wait_for(is_open, 30)
    loading = complete(server)
    assert (httpx.get(f"{server.url}/readyz").status_code, loading.status_code) == (503, 503)
    assert (
        loading.headers["retry-after"] == "2" and loading.json()["error"]["type"] == "server_error"
    )
    server.wait_ready()
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    engine = server.engine_pid()
    assert "libtorch" in Path(f"/proc/{engine}/maps").read_text()

    streams = [Stream(server, 2500) for _ in range(2)]
    wait_for(lambda: server.metric("nibble_num_requests_waiting") == 1)
    full = complete(server)
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")

    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
    draining = complete(server)
    assert (draining.status_code, draining.headers["retry-after"]) == (503, "10")
    assert server.process.wait(130) == 0
    for stream in streams:
        stream.join(5)
        assert (
            stream.body.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in stream.body
        )
    assert is_gone(engine)
    log = server.log.read_text()
    assert "KV cache, reserved" in log and "Traceback" not in log


def test_second_signal_forces(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, *SMALL).wait_ready()
    engine = server.engine_pid()
    stream = Stream(server, 8000)
    assert stream.started.wait(20)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 128 + signal.SIGINT
    assert is_gone(engine)


def test_shutdown_timeout_cuts_streams_off(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, *SMALL, "--shutdown-timeout", "0.2").wait_ready()
    stream = Stream(server, 8000)
    assert stream.started.wait(20)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    stream.join(5)
    assert "shutting down" in stream.body and stream.body.endswith("data: [DONE]\n\n")
    assert "Traceback" not in server.log.read_text()


def test_engine_death(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, *SMALL).wait_ready()
    streams = [Stream(server, 8000) for _ in range(4)]
    assert all(stream.started.wait(20) for stream in streams)
    os.kill(server.engine_pid(), signal.SIGKILL)
    wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503, 2)
    assert server.process.wait(10) == 1
    for stream in streams:
        stream.join(5)
        assert '"type":"server_error"' in stream.body and stream.body.endswith("data: [DONE]\n\n")
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="whether it computes is read from /proc")
def test_an_engine_that_is_stuck_is_the_end(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, *SMALL, "--engine-timeout", "2").wait_ready()
    streams = [Stream(server, 8000) for _ in range(4)]
    assert all(stream.started.wait(20) for stream in streams)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    wait_for(lambda: httpx.get(f"{server.url}/livez").status_code == 503, 10)
    assert server.process.wait(10) == 1 and is_gone(engine)
    for stream in streams:
        stream.join(5)
        assert '"type":"server_error"' in stream.body and stream.body.endswith("data: [DONE]\n\n")
    log = server.log.read_text()
    assert "the engine is stuck" in log and "Traceback" not in log


def test_the_engine_does_not_outlive_the_server(
    start_server: StartServer, tiny_llama: Path
) -> None:
    server = start_server(tiny_llama, *SMALL).wait_ready()
    engine = server.engine_pid()
    server.process.kill()
    wait_for(lambda: is_gone(engine))


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5])
def test_signal_while_loading(start_server: StartServer, tiny_llama: Path, seconds: float) -> None:
    server = start_server(tiny_llama, *SMALL)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    wait_for(lambda: children.read_text() != "", 30)
    time.sleep(seconds)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log.read_text()


# The engine is up in the moment between the closing of the socket and the end of loading.
STOPPED_WHEN_READY = """
import asyncio, os, signal, sys
from nibble import cli
from nibble.engine.client import AsyncEngine
from nibble.server import lifecycle

sockets, bind, start = [], lifecycle._bind, AsyncEngine.start

def recorded(options):
    sockets.append(bind(options))
    return sockets[0]

async def started(config):
    engine = await start(config)
    os.kill(os.getpid(), signal.SIGTERM)
    while sockets[0].fileno() != -1:
        await asyncio.sleep(0)
    return engine

lifecycle._bind = recorded
lifecycle.serve.__defaults__ = (started,)
sys.exit(cli.main())
"""


def test_signal_when_ready(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, *SMALL, code=STOPPED_WHEN_READY)
    assert server.process.wait(60) == 0
    log = server.log.read_text()
    assert "Traceback" not in log and "failed" not in log


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nibble", "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_corrupt_model(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(
            data[: len(data) // 2] if file.suffix == ".safetensors" else data
        )
    done = run(str(folder), "--port", "0")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_incomplete_model(tiny_llama: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        if file.name != missing:
            (folder / file.name).write_bytes(file.read_bytes())
    done = run(str(folder), "--port", "0")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr


def test_port_in_use(server: ServerProcess, tiny_llama: Path) -> None:
    done = run(str(tiny_llama), "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 2 and "cannot listen" in done.stderr


def test_of_two_servers_that_start_at_once_one_is_told() -> None:
    """Both may bind while neither listens."""
    with lifecycle._bind(lifecycle.ServeOptions(port=0, model_names=("a",))) as first:
        options = lifecycle.ServeOptions(port=first.getsockname()[1], model_names=("b",))
        with pytest.raises(UserError, match="cannot listen on"):
            lifecycle._bind(options)


def test_chat_with_this_server(server: ServerProcess) -> None:
    def chat(*args: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "nibble",
            "chat",
            "--url",
            server.url,
            "--prompt",
            "x",
            *args,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")

    done = chat("--api-key", KEY, "--max-tokens", "5")
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
    refused = chat()
    assert refused.returncode == 2 and "401" in refused.stderr


BROKEN = """
import asyncio, logging, sys
from nibble.engine.config import EngineConfig
from nibble.errors import UserError
from nibble.server import lifecycle

class Panic(BaseException):
    pass

async def start_engine(config):
    if {where!r} == "engine":
        raise {error}
    await asyncio.sleep(3600)

def from_pretrained(*args):
    raise {error}

if {where!r} == "tokenizer":
    lifecycle.Tokenizer.from_pretrained = from_pretrained
logging.basicConfig()
options = lifecycle.ServeOptions(port=0, model_names=("m",))
sys.exit(lifecycle.serve(EngineConfig(model={model!r}), options, start_engine))
"""


@pytest.mark.parametrize("where", ["tokenizer", "engine"])
@pytest.mark.parametrize("error", ["RuntimeError('what went wrong')", "Panic('what went wrong')"])
def test_a_defect_at_the_start_ends_the_process_and_is_logged(
    tiny_llama: Path, where: str, error: str
) -> None:
    code = BROKEN.format(where=where, error=error, model=str(tiny_llama))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.endswith(": what went wrong")]
    assert "Traceback" in done.stderr and len(told) == 1  # Python 3.13 also shows the line of code


def test_bad_input_found_by_the_tokenizer_is_the_callers_error(tiny_llama: Path) -> None:
    code = BROKEN.format(where="tokenizer", error="UserError('one line')", model=str(tiny_llama))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("nibble.errors.UserError: one line\n")


def test_a_hub_model_is_downloaded_once_by_the_engine(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        lifecycle.Tokenizer, "from_pretrained", lambda model, revision: read.append(model)
    )

    async def start(model: str) -> bool:
        """Whether the tokenizer was read before the engine was up."""
        engine = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(lifecycle._tokenizer(EngineConfig(model=model), engine))
        done, _ = await asyncio.wait({task}, timeout=5.0 if Path(model).exists() else 0.05)
        engine.set_result(None)
        await task
        return bool(done)

    assert not asyncio.run(start("owner/name")) and asyncio.run(start(str(tiny_llama)))
    assert read == ["owner/name", str(tiny_llama)]


def changed(model: Path, folder: Path, **files: str | bytes | None) -> Path:
    """A copy of a model folder with some files' content replaced, or left out."""
    folder.mkdir()
    for file in model.iterdir():
        if files.get(file.name, "") is not None:
            (folder / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": None, "tokenizer.model": "\n\x0e\n\x05<unk>"}, "tokenizer"),
        ({"tokenizer.json": None, "vocab.json": "{}"}, "tokenizer files cannot be read"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": [1]}'}, "makes no sense"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}'}, "makes no sense"),
        ({"chat_template.jinja": b"\xff\xfe{{ x }}"}, "is not UTF-8"),
        ({"generation_config.json": '{"eos_token_id": "x"}'}, "eos_token_id"),
    ],
)
def test_tokenizers_that_cannot_be_read(
    tiny_llama: Path, tmp_path: Path, files: dict[str, str | bytes | None], said: str
) -> None:
    done = run(str(changed(tiny_llama, tmp_path / "m", **files)), "--port", "0")
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last[:7]) == (2, "error: ") and said in last, done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_chat_template_is_said_and_text_is_completed(
    start_server: StartServer, tiny_llama: Path, tmp_path: Path
) -> None:
    config = (
        '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": [{"name": "default"}]}'
    )
    folder = changed(
        tiny_llama,
        tmp_path / "m",
        **{"tokenizer_config.json": config, "chat_template.jinja": "{% if %}"},
    )
    server = start_server(folder, *SMALL).wait_ready()
    assert complete(server).status_code == 200
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=chat)
    assert refused.status_code == 400 and "line 1" in refused.json()["error"]["message"]
    assert "no valid Jinja: line 1" in server.log.read_text()
    server.process.kill()
