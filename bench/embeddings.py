"""Embeddings of many short texts: `nibble serve` over HTTP, with the openai client, against sentence-transformers in
process, in turn on the same cores.

    python bench/embeddings.py [--model all-MiniLM-L6-v2] [--texts 1000] [--quantize int8] [--repeats 3] [--save]

    texts/s   texts / seconds for all of them, tokenizing included; the best of the repeats, because what disturbs a
              measurement only ever makes it slower
    ratio     Nibble's over sentence-transformers'

sentence-transformers has batches of 32, its default, and of 128. Nibble is asked in one request, and in four at once.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import machine
import numpy as np
import openai
import torch
from sentence_transformers import SentenceTransformer

from nibble.tools.fetch import ENCODER_WHEELS, sentence_encoder

MODELS = Path(__file__).resolve().parent.parent / "models"
_WORDS = (
    "the a of market river physics small quick model lists prices evening garden report city where"
)

WORDS = _WORDS.split()


def short_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of 4 to 24 words, as questions and headlines are."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 24))) + "." for _ in range(count)]


def best(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each. They take turns: what else the machine does meets them all."""
    taken = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for way, work in ways.items():
            begin = time.perf_counter()
            work()
            taken[way] = min(taken[way], time.perf_counter() - begin)
    return taken


class Server:
    """A `nibble serve` of one model."""

    def __init__(self, model: Path, flags: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "nibble", "serve", str(model), "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.model = model.name
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended: {' '.join(command)}")
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def embed(self, texts: list[str]) -> np.ndarray:
        answer = self.client.embeddings.create(
            model=self.model, input=texts, extra_body={"truncate_prompt_tokens": -1}
        )
        return np.array([each.embedding for each in answer.data], dtype=np.float32)

    def embed_at_once(self, texts: list[str], requests: int) -> None:
        parts = [texts[i::requests] for i in range(requests)]
        with ThreadPoolExecutor(requests) as pool:
            list(pool.map(self.embed, parts))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-MiniLM-L6-v2", choices=ENCODER_WHEELS)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--quantize", choices=("int8", "int4", "fp8"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="a file in bench/results/")
    args = parser.parse_args()
    folder = sentence_encoder(MODELS, args.model)
    texts = short_texts(args.texts)
    flags = ["--quantize", args.quantize] if args.quantize else []
    server = Server(folder, flags)
    peer = SentenceTransformer(str(folder), device="cpu")
    try:
        found, want = server.embed(texts), peer.encode(texts, batch_size=32)
        cosine = float((found * want).sum(1).min())
        ways: dict[str, Callable[[], object]] = {
            "sentence-transformers, batches of 32": lambda: peer.encode(texts, batch_size=32),
            "sentence-transformers, batches of 128": lambda: peer.encode(texts, batch_size=128),
            "nibble serve, one request": lambda: server.embed(texts),
            "nibble serve, four requests": lambda: server.embed_at_once(texts, 4),
        }
        rates = {way: len(texts) / seconds for way, seconds in best(ways, args.repeats).items()}
    finally:
        server.stop()
    result = {
        **machine.describe(),
        "model": args.model,
        "texts": len(texts),
        "weights": args.quantize or "float32",
        "threads": torch.get_num_threads(),
        "least_cosine": cosine,
        "texts_per_second": rates,
    }
    print(json.dumps(result))
    if args.save:
        print(f"written to {machine.save('embeddings', result).relative_to(machine.ROOT)}")
    print(
        f"{args.model}, {len(texts)} texts, {args.quantize or 'float32'}: cosine at least {cosine:.6f}"
    )
    baseline = max(rate for way, rate in rates.items() if way.startswith("sentence"))
    for way, rate in rates.items():
        print(f"  {way:<40}{rate:8.0f} texts/s  ratio {rate / baseline:.2f}")


if __name__ == "__main__":
    main()
