"""What serving costs beside the model: CPU milliseconds per output token of each process, with a model that costs none.

    python bench/host.py MODEL [--read-mib 128] [--loads 1x4 8x16 32x64]

The server is the real one, its engine process runs the real loop and scheduler, and in place of the model stands a
runner that reads `--read-mib` of memory on all cores in each step, as a model reads its weights, and then repeats a
text. MODEL gives the tokenizer alone. CPU time is what the kernel accounts to the threads of a process
(/proc/PID/task/*/schedstat).

    load      this process: bench/load.py
    http      nibble serve
    engine    its engine process, what the runner reads included
"""

import argparse
import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any

from load import random_prompts, run
from serving import PROMPT, Target, started

from nibble.engine.client import AsyncEngine
from nibble.engine.config import EngineConfig
from nibble.engine.core import EngineCore
from nibble.engine.messages import Ready
from nibble.engine.process import main as engine_main
from nibble.engine.scheduling.batch import ScheduledBatch, StepResult
from nibble.engine.scheduling.kv_cache_manager import KVGroup
from nibble.engine.text.tokenizer import Tokenizer
from nibble.server import lifecycle

_NUM_BLOCKS, _BLOCK_SIZE, _MAX_MODEL_LEN = 4096, 16, 8192


class PlaybackRunner:
    """Computes nothing: the next token of every request is the next token of one text."""

    num_blocks, block_size, max_model_len = _NUM_BLOCKS, _BLOCK_SIZE, _MAX_MODEL_LEN
    eos_token_ids: list[int] = []
    kv_groups = (KVGroup(_NUM_BLOCKS),)

    def __init__(self, config: EngineConfig, read_mib: int):
        import torch  # in the engine process alone, as in a real server

        self.weights = (
            torch.ones(read_mib * 2**9, 2**10, dtype=torch.bfloat16) if read_mib else None
        )
        tokenizer = Tokenizer.from_pretrained(config.model)
        self.vocab_size = tokenizer.vocab_size
        self.tokens = tokenizer.encode(
            (Path(__file__).parent.parent / "quant/data/eval_prose.txt").read_text()
        )

    def ready(self) -> Ready:
        return Ready(
            self.max_model_len,
            self.vocab_size,
            [],
            self.num_blocks,
            self.block_size,
            "none",
            "none",
            "none",
            {},
            {},
        )

    def execute(self, batch: ScheduledBatch) -> StepResult:
        if self.weights is not None:
            self.weights.sum()
        result = StepResult()
        for item in batch.items:
            if item.samples:
                request = item.request
                token = self.tokens[request.num_output_tokens % len(self.tokens)]
                result.tokens[request.request_id] = [token]
        return result


def cpu_ms(pid: int | str) -> float:
    """CPU time of all live threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e6


async def measure(server: Any, clients: int, requests: int, output: int) -> dict[str, Any]:
    http = _listener(server.port)
    children = Path(f"/proc/{http}/task/{http}/children").read_text().split()
    pids = {"load": "self", "http": http, "engine": children[0]}
    prompts = random_prompts(requests, PROMPT, seed=clients)
    await run(server, prompts[:clients], 16, clients)
    before = {name: cpu_ms(pid) for name, pid in pids.items()}
    figures = await run(server, prompts, output, clients)
    tokens = requests * output
    costs = {name: (cpu_ms(pid) - before[name]) / tokens for name, pid in pids.items()}
    return figures | {f"{name}_cpu_ms_per_token": round(cost, 4) for name, cost in costs.items()}


def _listener(port: int) -> str:
    """The process whose command line has this port: the server that was just started."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        if f"--serve {port}".replace(" ", "\0") in file.read_text():
            return file.parent.name
    raise LookupError(f"no server on port {port}")


def serve(model: str, port: int, read_mib: int) -> int:
    command = (sys.executable, __file__, model, "--read-mib", str(read_mib))
    options = lifecycle.ServeOptions(port=port, model_names=("playback",))
    return lifecycle.serve(
        EngineConfig(model=model), options, partial(AsyncEngine.start, command=command)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or .gguf file with the tokenizer")
    parser.add_argument(
        "--read-mib", type=int, default=0, help="what a step of the absent model reads"
    )
    parser.add_argument(
        "--loads", nargs="+", default=["1x4", "8x16", "32x64"], metavar="CLIENTSxREQUESTS"
    )
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fd is not None:
        return engine_main(
            ["--fd", str(args.fd)],
            lambda config: EngineCore(config, PlaybackRunner(config, args.read_mib)),
        )
    if args.serve is not None:
        return serve(args.model, args.serve, args.read_mib)
    command = (
        f"{sys.executable} {__file__} {args.model} --read-mib {args.read_mib} --serve {{port}}"
    )
    with started(Target("host", command)) as (server, took):
        print(f"start to first token {took:.2f} s")
        for load in args.loads:
            clients, _, requests = load.partition("x")
            figures = asyncio.run(measure(server, int(clients), int(requests), args.output))
            print(
                {
                    key: value
                    for key, value in figures.items()
                    if key not in ("prompt_tokens", "seconds")
                }
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
