"""`make bench-gpu`, engine: start-up, time to first token and tokens per second of a whole Llama-3-8B of random
weights, in this process, through the `LLM` class.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import random_llama
from gpu_cells import Cell, Lab, Row
from load import random_prompts
from offline import DECODE_PROMPT, seconds

from nibble import LLM

FORMATS = ("awq", "fp8", "bf16")  # the most telling first: time may run out
BATCHES, PROMPTS = (1, 32, 256), (128, 2048, 8192)
TOKENS, QUICK_TOKENS = 128, 32


def plan(quick: bool) -> list[Cell]:
    """A cell for each format."""
    return [Cell("engine", f"Llama-3-8B {fmt}", {"format": fmt, "tokens": QUICK_TOKENS if quick else TOKENS})
            for fmt in FORMATS]


def measure(cell: Cell, lab: Lab) -> Iterator[Row]:
    """The checkpoint is written to a temporary folder, so that its files are in the cache when it is loaded."""
    if not lab.rotate:  # warming up: the engine compiles what it needs before it is timed
        return
    fmt, tokens = cell.arguments["format"], cell.arguments["tokens"]
    folder = Path(tempfile.mkdtemp(prefix="nibble-bench-"))
    try:
        random_llama.write(folder, fmt, random_llama.Shape(), lab.device)
        begin = time.perf_counter()
        llm = LLM(str(folder), max_model_len=max(PROMPTS) + 1, max_num_seqs=max(BATCHES), max_num_batched_tokens=8192,
                  enable_prefix_caching=False)
    finally:
        shutil.rmtree(folder)  # a loaded model needs its files no more
    ready = time.perf_counter() - begin
    seconds(llm, random_prompts(1, 16, 0), 1)
    yield Row({"format": fmt, "figure": "start to ready, s", "value": round(ready, 2),
               "kernels": dict(llm.core.runner.kernels.used)})
    yield Row({"format": fmt, "figure": "start to first token, s", "value": round(time.perf_counter() - begin, 2)})
    for length in PROMPTS:
        seconds(llm, random_prompts(1, length, 1), 1)
        best = min(seconds(llm, random_prompts(1, length, seed), 1) for seed in (2, 3, 4))
        yield Row({"format": fmt, "figure": f"time to first token at {length}, ms", "value": round(best * 1000, 2)})
    for batch in BATCHES:
        rate = round(_rate(llm, batch, tokens), 1)
        yield Row({"format": fmt, "figure": f"tokens per second at {batch}", "value": rate})


def _rate(llm: LLM, batch: int, tokens: int) -> float:
    """Decoded tokens per second, the prompts' time taken off; the first run warms up what this batch needs."""
    rates = []
    for repeat in range(3):
        first, whole = (random_prompts(batch, DECODE_PROMPT, seed) for seed in (100 + repeat, 200 + repeat))
        rates.append(batch * (tokens - 1) / (seconds(llm, whole, tokens) - seconds(llm, first, 1)))
    return max(rates[1:])
