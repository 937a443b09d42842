"""Real server processes, started as a user starts them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

KEY = "test-key"


@dataclass
class ServerProcess:
    """A running `nibble serve`; `log` holds its stdout and stderr."""

    process: subprocess.Popen
    url: str
    log: Path

    def wait_ready(self, timeout: float = 120.0) -> "ServerProcess":
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}: {self.log.read_text()}"
                )
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def engine_pid(self) -> int:
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return int(children[0])

    def metric(self, name: str) -> float:
        """The one sample of a metric family."""
        lines = httpx.get(
            f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        ).text.splitlines()
        return next(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} "))
        )


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ServerProcess]]:
    """start_server(model, *flags) -> ServerProcess, killed at the end of the session if it still runs. `code` is run in
    place of the `nibble` command."""
    started: list[ServerProcess] = []

    def start(model: Path, *flags: str, code: str = "") -> ServerProcess:
        folder = tmp_path_factory.mktemp("server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with (folder / "log").open("wb") as log:
            command = [
                sys.executable,
                *(("-c", code) if code else ("-m", "nibble")),
                "serve",
                str(model),
                "--port",
                str(port),
                *flags,
            ]
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        started.append(ServerProcess(process, f"http://127.0.0.1:{port}", folder / "log"))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess], tiny_llama: Path) -> ServerProcess:
    """The server that most tests share: a tiny float32 model behind KEY."""
    return start_server(
        tiny_llama,
        "--api-key",
        KEY,
        "--dtype",
        "float32",
        "--kv-cache-memory",
        "16MiB",
        "--served-model-name",
        "tiny",
        "--served-model-name",
        "alias",
    ).wait_ready()


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A plain HTTP client with the key."""
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as client:
        yield client
