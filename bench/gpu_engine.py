"""`make bench-gpu`, engine: start-up, time to first token and tokens per second of a whole Llama-3-8B of random
weights, in this process, through the `LLM` class.
"""

import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import random_llama
import torch
from gpu_cells import Cell, Lab, Row
from load import random_prompts
from offline import DECODE_PROMPT, seconds

from nibble import LLM

FORMATS = ("awq", "fp8", "bf16")  # the most telling first: time may run out
BATCHES, PROMPTS = (1, 32, 256), (128, 2048, 8192)
TOKENS, QUICK_TOKENS = 128, 32
ENGINE = {
    "max_model_len": max(PROMPTS) + 1,
    "max_num_seqs": max(BATCHES),
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
}
STARTED = "process start to first token and end, s"


def plan(quick: bool) -> list[Cell]:
    """A cell for each format."""
    return [
        Cell(
            "engine",
            f"Llama-3-8B {fmt}",
            {"format": fmt, "tokens": QUICK_TOKENS if quick else TOKENS},
        )
        for fmt in FORMATS
    ]


def measure(cell: Cell, lab: Lab) -> Iterator[Row]:
    """The checkpoint is written to a temporary folder, so that its files are in the cache when it is loaded."""
    fmt, tokens = cell.arguments["format"], cell.arguments["tokens"]
    folder = Path(tempfile.mkdtemp(prefix="nibble-bench-"))
    try:
        random_llama.write(folder, fmt, random_llama.Shape(), lab.device)
        for figure, value in _speed(str(folder), tokens):
            yield Row({"format": fmt, "figure": figure, "value": round(value, 2)})
        gc.collect()  # what the engine held on the card is free for the next process
        torch.cuda.empty_cache()
        yield Row({"format": fmt, "figure": STARTED, "value": round(_start(folder), 2)})
    finally:
        shutil.rmtree(folder)


def _speed(model: str, tokens: int) -> Iterator[tuple[str, float]]:
    """(figure, value) of an engine in this process. What compiles does so before it is timed."""
    llm = LLM(model, **ENGINE)
    for length in PROMPTS:
        seconds(llm, random_prompts(1, length, 1), 1)
        best = min(seconds(llm, random_prompts(1, length, seed), 1) for seed in (2, 3, 4))
        yield f"time to first token at {length}, ms", best * 1000
    for batch in BATCHES:
        yield f"tokens per second at {batch}", _rate(llm, batch, tokens)


def _start(folder: Path) -> float:
    """Seconds from the start of a process of its own to its first token; kernels were compiled by earlier ones."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"start failed: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - begin


def _rate(llm: LLM, batch: int, tokens: int) -> float:
    """Decoded tokens per second, the prompts' time taken off; the first run warms up what this batch needs."""
    rates = []
    for repeat in range(3):
        first, whole = (
            random_prompts(batch, DECODE_PROMPT, seed) for seed in (100 + repeat, 200 + repeat)
        )
        rates.append(batch * (tokens - 1) / (seconds(llm, whole, tokens) - seconds(llm, first, 1)))
    return max(rates[1:])


if __name__ == "__main__":
    seconds(LLM(sys.argv[1], **ENGINE), random_prompts(1, 16, 0), 1)
