"""What large bodies leave behind in the HTTP process."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from .conftest import KEY, ServerProcess


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; only glibc is told to trim")
def test_the_memory_of_large_bodies_is_given_back(server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "y" * 2500}] * 3500
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    def post(_: int) -> int:
        url = f"{server.url}/v1/chat/completions"
        return httpx.post(url, content=body, headers=headers, timeout=60).status_code

    before = resident_mb(server.process.pid)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(post, range(24))) == {400}  # longer than the context
    deadline = time.monotonic() + 10
    while resident_mb(server.process.pid) > before + 60 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert resident_mb(server.process.pid) < before + 60
