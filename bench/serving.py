"""Measure a server from outside, over HTTP, with streaming clients on the same machine:

    start-up     seconds from starting the process to the first streamed token (files in the page cache, median of 3)
    first token  milliseconds for a 512-token prompt, one client (median of 5 different random prompts)
    throughput   tokens per second for 1, 8 and 32 clients, 128 random tokens in, 128 out, no two prompts alike

    python bench/serving.py models/SmolLM2-135M-Instruct models/SmolLM2-135M-Instruct-AWQ
    python bench/serving.py MODEL --peer 'vllm=PATH/bin/vllm serve MODEL --port {port}'
    python bench/serving.py MODEL --peer-url llama.cpp=http://127.0.0.1:8080

Servers are measured one after the other, each alone on the machine (a peer given by URL runs all the time, so stop its
spinning first). The table is printed, and everything is written to bench/results/.
"""

import argparse
import asyncio
import contextlib
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from load import LoadError, Server, complete, random_prompts, run
from rich.console import Console
from rich.table import Table

from nibble.tools.demo import convert
from nibble.tools.fetch import dense_smollm2, fetch_smollm2

STARTS = 3
START_TIMEOUT = 300.0  # seconds
TTFT_PROMPT, TTFT_REPEATS = 512, 5
PROMPT, OUTPUT = 128, 128
LOADS = ((1, 4), (8, 16), (32, 64))  # (clients, requests)

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure: started by `command` (with {port} filled in), or already up at `url`."""

    name: str
    command: str = ""
    url: str = ""


@contextlib.contextmanager
def started(target: Target) -> Iterator[tuple[Server, float]]:
    """The target's server, and the seconds from its start to its first streamed token (0 if it was up already)."""
    if not target.command:
        yield asyncio.run(Server.at(target.url)), 0.0
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            shlex.split(target.command.replace("{port}", str(port))), stdout=log, stderr=log
        )
        try:
            server = asyncio.run(_first_token(process, f"http://127.0.0.1:{port}"))
            if server is None:
                log.seek(0)
                raise LoadError(
                    f"{target.name} did not start: {log.read()[-2000:].decode(errors='replace')}"
                )
            yield server, time.perf_counter() - begin
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _first_token(process: subprocess.Popen[bytes], url: str) -> Server | None:
    """The server as soon as it has streamed a token; None if it exits or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            server = await Server.at(url)
            await complete(server, random_prompts(1, 16, seed=0)[0], 1)
            return server
        except (LoadError, OSError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.02)
    return None


def measure(target: Target, loads: tuple[tuple[int, int], ...], starts: int) -> dict[str, Any]:
    """All figures of one target."""
    figures: dict[str, Any] = {"name": target.name, "command": target.command or target.url}
    seconds = []
    for last in [False] * (starts - 1) + [True]:
        with (
            console.status(f"{target.name}: start {len(seconds) + 1}"),
            started(target) as (server, took),
        ):
            seconds.append(round(took, 2))
            if last:
                figures |= asyncio.run(_under_load(server, target.name, loads))
    if target.command:
        figures["start_to_first_token_s"] = {"median": statistics.median(seconds), "all": seconds}
    return figures


async def _under_load(
    server: Server, name: str, loads: tuple[tuple[int, int], ...]
) -> dict[str, Any]:
    await run(
        server, random_prompts(4, PROMPT, seed=1), 16, clients=2
    )  # warm-up: thread pools, allocator, caches
    first = await run(server, random_prompts(TTFT_REPEATS, TTFT_PROMPT, seed=2), 1, clients=1)
    figures: dict[str, Any] = {"ttft_512_ms": first["ttft_ms_median"], "loads": []}
    for clients, requests in loads:
        prompts = random_prompts(requests, PROMPT, seed=100 + clients)
        figures["loads"].append(await run(server, prompts, OUTPUT, clients))
        console.print(
            f"{name}: {clients} clients: {figures['loads'][-1]['tokens_per_second']} tok/s"
        )
    return figures


def table(results: list[dict[str, Any]]) -> Table:
    """One row a server, in the order measured."""
    shown = Table(
        "",
        "start to first token, s",
        f"first token of {TTFT_PROMPT}, ms",
        "ms per token, 1 client",
        *(f"tok/s, {load['clients']}" for load in results[0]["loads"]),
    )
    for figures in results:
        start = figures.get("start_to_first_token_s", {}).get("median", "")
        shown.add_row(
            figures["name"],
            str(start),
            str(figures["ttft_512_ms"]),
            str(figures["loads"][0]["ms_per_output_token_median"]),
            *(str(load["tokens_per_second"]) for load in figures["loads"]),
        )
    return shown


def _targets(args: argparse.Namespace) -> list[Target]:
    serve = shlex.quote(str(Path(sys.executable).with_name("nibble"))) + " serve"
    models = [Path(model) for model in args.models]
    if args.demo_models:
        models += _demo_models()
    ours = [
        Target(
            f"nibble {model.name}",
            f"{serve} {shlex.quote(str(model))} --port {{port}} {args.serve_args}",
        )
        for model in models
    ]
    commands = [
        Target(name, command=command) for name, _, command in (p.partition("=") for p in args.peer)
    ]
    return (
        ours
        + commands
        + [Target(name, url=url) for name, _, url in (p.partition("=") for p in args.peer_url)]
    )


def _demo_models() -> list[Path]:
    """The demo's model in 16 bits and in 4, fetched and converted if they are not there yet."""
    folder = machine.ROOT / "models"
    return [dense_smollm2(folder), convert(fetch_smollm2(folder))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="model folders or files for nibble serve")
    parser.add_argument(
        "--demo-models", action="store_true", help="also the demo's model, bf16 and AWQ"
    )
    parser.add_argument("--serve-args", default="", help="more flags for nibble serve")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another server to start",
    )
    parser.add_argument(
        "--peer-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another server, running",
    )
    parser.add_argument("--name", default="serving", help="bench/results/<date>-NAME.json")
    parser.add_argument(
        "--quick", action="store_true", help="one start and a few requests: to try the script"
    )
    args = parser.parse_args()
    loads, starts = (((1, 1), (8, 8)), 1) if args.quick else (LOADS, STARTS)
    result = {"what": "serving over HTTP", **machine.describe()}
    result["results"] = [measure(target, loads, starts) for target in _targets(args)]
    if not result["results"]:
        parser.error("nothing to measure: name a model, or --demo-models")
    Console(width=120).print(table(result["results"]))
    if not args.quick:
        print(f"written to {machine.save(args.name, result).relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
