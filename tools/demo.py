"""`make demo` and `make serve`: Nibble's main job, end to end, on a real model.

    fetch SmolLM2-135M-Instruct -> convert to 4-bit AWQ -> nibble serve -> stream one chat answer -> report

Each step that left its result in `models/` is skipped the next time.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nibble.errors import UserError
from nibble.quant.checkpoint import open_checkpoint
from nibble.tools.fetch import NAME, fetch_smollm2

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
QUANTIZED = MODELS / f"{NAME}-AWQ"
SERVER_LOG = ROOT / ".cache" / "demo-server.log"
QUESTION = "Give me three tips for a good night's sleep."
MAX_TOKENS = 160
READY_TIMEOUT = 120.0  # seconds

console = Console()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one streamed answer took, as a client sees it."""

    prompt_tokens: int
    completion_tokens: int
    first_token: float  # seconds from the request to the first piece of text
    total: float  # seconds from the request to the last piece of text

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first over the time they took."""
        return (self.completion_tokens - 1) / max(self.total - self.first_token, 1e-9)


def convert(source: Path) -> Path:
    """Convert `source` to AWQ in QUANTIZED, unless that is there already, measured and all."""
    if (QUANTIZED / "nibble_quality.json").exists():
        console.print(f"Using {_shown(QUANTIZED)}, converted before")
        return QUANTIZED
    command = [
        sys.executable,
        str(ROOT / "tools" / "convert.py"),
        str(source),
        "--awq",
        "--overwrite",
        "-o",
        str(QUANTIZED),
    ]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(
            f"{_shown(source)}: the conversion ended with code {code} (its message is above)"
        )
    return QUANTIZED


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[str, float]]:
    """A `nibble serve` process on a free port, stopped on exit: (its URL, seconds from start until it was ready)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    SERVER_LOG.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with SERVER_LOG.open("w") as log:
        server = subprocess.Popen(_serve_command(model, port), stdout=log, stderr=subprocess.STDOUT)
    try:
        with Progress(
            TextColumn("Starting the server"), BarColumn(), TimeElapsedColumn(), console=console
        ) as bar:
            bar.add_task("", total=None)  # how long it takes is not known
            _wait_until_ready(server, url)
        yield url, time.perf_counter() - started
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _serve_command(model: Path, port: int) -> list[str]:
    nibble = str(Path(sys.executable).with_name("nibble"))
    return [nibble, "serve", str(model), "--port", str(port), "--served-model-name", NAME]


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(
                f"the server exited with code {server.returncode}; the end of {_shown(SERVER_LOG)}:\n"
                + "\n".join(SERVER_LOG.read_text().splitlines()[-10:])
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5.0).status_code == 200:
                return
        time.sleep(0.05)
    raise UserError(
        f"the server was not ready within {READY_TIMEOUT:.0f} s (see {_shown(SERVER_LOG)})"
    )


def chat(url: str, question: str) -> Answer:
    """Stream the answer to one question to the terminal, through the OpenAI API."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    console.print(f"\n[bold]> {question}[/bold]\n")
    first, last = None, 0.0
    usage: dict[str, int] = {}
    started = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120.0) as response:
        if response.status_code != 200:
            raise UserError(
                f"the server answered {response.status_code}: {response.read().decode()}"
            )
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise UserError(f"the server broke off: {event['error']['message']}")
            usage = event.get("usage") or usage
            if text := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                last = time.perf_counter() - started
                first = first or last
                console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    return Answer(usage["prompt_tokens"], usage["completion_tokens"], first or last, last)


def report(source: Path, model: Path, ready: float, answer: Answer) -> Table:
    """Size before and after, quality against what was converted, speed: the demo's last words."""
    original = open_checkpoint(source)
    in_16_bits = 2 * sum(math.prod(original.shape(name)) for name in original.names())
    quality = json.loads((model / "nibble_quality.json").read_text())
    table = Table(title=f"{NAME}, {quality['scheme']}", show_header=False, title_justify="left")
    table.add_row("Size in bfloat16", f"{in_16_bits / 1e6:.0f} MB")
    if original.nbytes < in_16_bits:
        table.add_row(f"Size of {source.name}, converted from", f"{original.nbytes / 1e6:.0f} MB")
    table.add_row(
        "Size now",
        f"{quality['bytes_after'] / 1e6:.0f} MB "
        f"({quality['bits_per_weight']:.2f} bits per weight in the decoder blocks)",
    )
    for row in quality["evaluation"]:
        table.add_row(
            f"Quality against {source.name}, {row['domain']}",
            f"perplexity {row['perplexity_reference']:.2f} -> {row['perplexity']:.2f}, "
            f"KL {row['kl_mean']:.3f} nats, same top token {row['top1_agreement']:.1%}",
        )
    table.add_row(
        "Conversion",
        f"{quality['minutes']:.1f} min, {quality['peak_rss_bytes'] / 1e9:.1f} GB of memory",
    )
    table.add_row("Server ready after", f"{ready:.1f} s")
    table.add_row(
        "First token",
        f"{1e3 * answer.first_token:.0f} ms for a prompt of {answer.prompt_tokens} tokens",
    )
    table.add_row(
        "Speed",
        f"{answer.tokens_per_second:.0f} tokens/s, {answer.completion_tokens} tokens, one client",
    )
    return table


def _next_steps(model: Path) -> str:
    """How to go on: the `nibble` command lies in the environment that this runs in."""
    activate = Path(sys.executable).with_name("activate")
    return (
        f"`make serve` keeps this server up; `make bench` measures it properly. The `nibble` command is there after\n"
        f"  source {_shown(activate)}\n"
        f"such as: nibble serve {_shown(model)}, or nibble convert MODEL --awq"
    )


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch a small model, convert it, serve it, chat with it."
    )
    parser.add_argument(
        "--serve", action="store_true", help="keep the server up instead of asking one question"
    )
    parser.add_argument("--port", type=int, default=8000, help="port for --serve")
    args = parser.parse_args()
    try:
        source = fetch_smollm2(MODELS)
        model = convert(source)
        if args.serve:
            command = _serve_command(model, args.port)
            os.execv(command[0], command)
        with serving(model) as (url, ready):
            answer = chat(url, QUESTION)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    console.print(report(source, model, ready, answer))
    console.print(_next_steps(model), highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
