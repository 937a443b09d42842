"""A real `nibble serve` process under attack, and what can be seen of it from outside: /proc, /metrics, its log, and
how long /health takes for somebody else."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

KEY = "attack-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
NAME = "target"  # what every server here calls its model
PROBE = Path(__file__).with_name("probe.py")


@dataclass
class Server:
    """A running `nibble serve`. Figures are of its processes together, memory in bytes."""

    process: subprocess.Popen
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, timeout: float = 120.0) -> "Server":
        """RuntimeError with the log if it ends first, or is not ready in time."""

        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit code {self.process.returncode}: {self.log_text()}")
            return self.get("/readyz").status_code == 200

        if not wait_for(is_ready, timeout):
            raise RuntimeError(f"not ready after {timeout:g} s: {self.log_text()}")
        return self

    def get(self, path: str, timeout: float = 10.0) -> httpx.Response:
        """A GET with the key; status 599 where there is no answer."""
        try:
            return httpx.get(self.url + path, headers=AUTHORIZED, timeout=timeout)
        except httpx.TransportError:
            return httpx.Response(599)

    def complete(self, prompt: object = "x", max_tokens: int = 8, **fields: object) -> dict:
        """One greedy completion, not streamed. httpx.HTTPError if it is refused."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = httpx.post(
            f"{self.url}/v1/completions", json=body | fields, headers=AUTHORIZED, timeout=300
        )
        answer.raise_for_status()
        return answer.json()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def complaint(self) -> str:
        return complaint_in(self.log_text())

    def engine_pid(self) -> int:
        for pid in children(self.process.pid):
            if b"nibble.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise RuntimeError("there is no engine process")

    def pids(self) -> list[int]:
        return [self.process.pid, *children(self.process.pid)]

    def memory(self) -> int:
        """Resident bytes that are the processes' own, so neither mapped weights nor libraries."""
        return sum(_status(pid, "RssAnon") for pid in self.pids()) * 1024

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def threads(self) -> int:
        return sum(_status(pid, "Threads") for pid in self.pids())

    def metric(self, name: str) -> float:
        """The one sample of a family; NaN where there is no answer."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith((f"nibble_{name}{{", f"nibble_{name} ")):
                return float(line.rsplit(" ", 1)[1])
        return float("nan")

    def is_idle(self) -> bool:
        """No sequence runs or waits, and every KV block is free."""
        return self.metric("num_requests_running") == self.metric(
            "num_requests_waiting"
        ) == 0 and self.metric("kv_blocks_free") == self.metric("kv_blocks")

    def seconds_to_idle(self, timeout: float = 60.0) -> float:
        """How long until `is_idle`; infinite if it is not by then."""
        start = time.monotonic()
        return time.monotonic() - start if wait_for(self.is_idle, timeout) else float("inf")

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def start(model: Path, folder: Path, *flags: str, limits: dict[int, int] | None = None,
          environment: dict[str, str] | None = None) -> Server:  # fmt: skip
    """`nibble serve MODEL` on a free port, its log and working directory in `folder`. limits: resource.RLIMIT_* of its
    processes. Nothing is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "nibble", "serve", str(model), "--port", str(port)]
    command += ["--api-key", KEY, "--served-model-name", NAME, *flags]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | own | (environment or {}),
            preexec_fn=partial(_limit, limits or {}),
        )
    return Server(process, port, log)


@contextlib.contextmanager
def serving(model: Path, folder: Path, *flags: str, **options: object) -> Iterator[Server]:
    """A server that is ready, and gone at the end, its engine too. flags and options: `start`'s."""
    server = start(model, folder, *flags, **options)  # type: ignore[arg-type]
    try:
        yield server.wait_ready()
    finally:
        end(server)


def end(server: Server) -> None:
    """Kill the server and its engine, which may be stopped, and wait for them."""
    pids = children(server.process.pid)
    server.process.kill()
    server.process.wait()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(map(is_gone, pids)), 10)


def _limit(limits: dict[int, int]) -> None:
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def complaint_in(log: str) -> str:
    """What no attack may bring into a log, as the end of a figure; "" if it is not there."""
    return ", a traceback" if "Traceback" in log else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    """Whether the condition came about in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@dataclass
class Health:
    """How /health was answered while somebody watched: a latency in seconds for each time, infinite for no answer."""

    seconds: list[float]

    @property
    def worst(self) -> float:
        return max(self.seconds, default=float("inf"))

    def __str__(self) -> str:
        unanswered = sum(second == float("inf") for second in self.seconds)
        if unanswered:
            return f"/health unanswered {unanswered} of {len(self.seconds)} times"
        return f"/health at most {1000 * self.worst:.0f} ms"


@contextlib.contextmanager
def watched(server: Server) -> Iterator[Health]:
    """Ask for /health all the time from another process, each time on a new connection; complete after the block."""
    health = Health([])
    process = subprocess.Popen(
        [sys.executable, "-I", str(PROBE), str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield health
    finally:
        out, _ = process.communicate(timeout=60)  # closes its stdin, which ends it
        health.seconds += map(float, out.split())
