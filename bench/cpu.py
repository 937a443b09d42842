"""`make bench-cpu`: Nibble beside vLLM and llama.cpp on this machine's CPU, in one run.

    python bench/cpu.py [--peers DIR] [--work DIR] [--parts http offline large families]

    http      servers with streaming clients (bench/serving.py): SmolLM2-135M-Instruct in every format Nibble serves,
              vLLM in bfloat16, llama.cpp in Q4_0
    offline   without a server (bench/offline.py, llama-bench, llama-batched-bench): prefill, and decode of 1, 8 and 32
              also as a share of the products that torch's int8 matrix product (oneDNN) reaches here, the ceiling
              of large batches
    large     the same for a Llama of 1.1 billion random weights in Q4_0, one file for all; its decode also as a share
              of the bandwidth with which this machine reads memory, measured just before
    families  the same, beside llama.cpp alone, for random weights of other shapes (bench/random_gguf.py): 64 experts,
              a gated delta rule, experts in MXFP4

Missing environments and models are made first (bench/peers.py; minutes, and gigabytes for vLLM). Nothing else should
run meanwhile; the load average is written down. Results: a table on the terminal, everything in bench/results/.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import peers
import torch
from rich.console import Console
from rich.table import Table
from serving import LOADS, STARTS, Target, measure
from serving import table as http_table

from nibble.kernels.cpu.arena import Arena
from nibble.tools.fetch import dense_smollm2, smollm2_gguf

BENCH = Path(__file__).resolve().parent
PARTS = ["http", "offline", "large", "families"]
FAMILIES = {"olmoe": "7B-A1B Q4_0", "qwen35": "hybrid 0.8B Q4_0", "gpt-oss": "GPT-OSS/4 MXFP4"}
BATCHES = [1, 8, 32]
CONVERSIONS = {
    "awq": ["--awq"],
    "gptq": ["--gptq"],
    "gptq-asym": ["--gptq", "--asym"],
    "gptq-act-order": ["--gptq", "--desc-act"],
    "fp8": ["--fp8"],
}
GGUF_TYPES = ["Q4_0", "Q4_K_M", "Q8_0"]
LLAMA_SERVER = "-np 32 -c 32768 --no-webui"  # 32 slots of 1024 tokens

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure without a server: tokens of the prefilled prompt, batches, tokens decoded by each request."""

    prompt: int
    batches: list[int]
    tokens: int


SMALL, LARGE = Size(512, BATCHES, 96), Size(256, BATCHES[:2], 32)
FAMILY = Size(512, BATCHES[:2], 48)


def prepare(work: Path, peer: Path) -> dict[str, Path]:
    """The models by name: the dense original, Nibble's conversions of it, llama.cpp's GGUF files, the random one."""
    work.mkdir(parents=True, exist_ok=True)
    models = {"bf16": dense_smollm2(machine.ROOT / "models")}
    for name, flags in CONVERSIONS.items():
        models[name] = work / f"SmolLM2-135M-{name}"
        if not models[name].exists():
            _run(
                [
                    sys.executable,
                    "-m",
                    "nibble",
                    "convert",
                    models["bf16"],
                    *flags,
                    "--group-size",
                    "64",
                    "--no-eval",
                    "-o",
                    models[name],
                ]
            )
    source = smollm2_gguf(work)
    for kind in GGUF_TYPES:
        models[kind] = work / f"SmolLM2-135M-{kind}.gguf"
        if not models[kind].exists():
            _run(
                [
                    peers.llama(peer, "llama-quantize"),
                    "--allow-requantize",
                    source,
                    models[kind],
                    kind,
                ]
            )
    models["large"] = _random("llama", work, peer)
    return models


def http(models: dict[str, Path], peer: Path) -> list[dict[str, Any]]:
    """Every server, one after the other."""
    nibble = shlex.join([str(Path(sys.executable).with_name("nibble")), "serve"])
    targets = [
        Target(
            "vLLM bf16",
            f"env VLLM_CPU_KVCACHE_SPACE=3 {peer}/vllm/bin/vllm serve {models['bf16']} --port {{port}} "
            "--max-model-len 2048",
        ),
        Target(
            "llama.cpp Q4_0",
            f"{peers.llama(peer, 'llama-server')} -m {models['Q4_0']} --port {{port}} "
            f"{LLAMA_SERVER}",
        ),
        *(
            Target(f"Nibble {name}", f"{nibble} {path} --port {{port}}")
            for name, path in models.items()
            if name != "large"
        ),
    ]
    return [
        measure(target, LOADS, 1 if target.name.startswith("vLLM") else STARTS)
        for target in targets
    ]


def offline(models: dict[str, Path], peer: Path) -> list[dict[str, Any]]:
    """SmolLM2 without a server, and Nibble's AWQ with each instruction set."""
    rows = [_llama(peer, models["Q4_0"], "llama.cpp Q4_0")]
    rows += [_nibble(path, f"Nibble {name}") for name, path in models.items() if name != "large"]
    for isa in _instruction_sets():
        rows.append(_nibble(models["awq"], f"Nibble awq, {isa}", f"cpu_isa={isa}"))
    rows.append(_nibble(models["awq"], "Nibble awq, 16-bit activations", "cpu_activations=bf16"))
    rows.append(_nibble(models["awq"], "Nibble awq, int8 KV cache", "kv_cache_dtype=int8"))
    ceiling = int8_products()
    for row in rows[1:]:
        row["int8_products_per_second"] = round(ceiling / 1e9) * 10**9
        busy = row["decode_tokens_per_second"][BATCHES[-1]] * row["products_per_token"]
        row["products_share"] = round(busy / ceiling, 3)
    return rows


def large(model: Path, peer: Path) -> list[dict[str, Any]]:
    """The random model; `bandwidth_share` is decode of one x the file's bytes / the bandwidth."""
    bandwidth = read_bandwidth()
    rows = [
        _llama(peer, model, "llama.cpp 1.1B Q4_0", LARGE),
        _nibble(model, "Nibble 1.1B Q4_0", size=LARGE),
    ]
    for row in rows:
        row["read_bandwidth_gb_s"] = round(bandwidth / 1e9, 1)
        row["bandwidth_share"] = round(
            row["decode_tokens_per_second"][1] * model.stat().st_size / bandwidth, 3
        )
    return rows


def families(work: Path, peer: Path) -> list[dict[str, Any]]:
    """Other shapes than Llama's, each as one file for both; ratio: Nibble's rates by llama.cpp's."""
    rows = []
    for shape, name in FAMILIES.items():
        model = _random(shape, work, peer)
        theirs = _llama(peer, model, f"llama.cpp {name}", FAMILY)
        ours = _nibble(model, f"Nibble {name}", size=FAMILY)
        decode, other = (row["decode_tokens_per_second"] for row in (ours, theirs))
        ours["ratio"] = {batch: round(decode[batch] / other[batch], 2) for batch in FAMILY.batches}
        prefill = "prefill_tokens_per_second"
        ours["ratio"]["prefill"] = round(ours[prefill] / theirs[prefill], 2)
        rows += [theirs, ours]
    return rows


def _random(shape: str, work: Path, peer: Path) -> Path:
    """A file of bench/random_gguf.py, made if it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"random-{shape}.gguf"
    if not out.exists():
        python = peer / "llama.cpp" / "bin" / "python"  # has the package gguf
        tokenizer = smollm2_gguf(machine.ROOT / "models")
        unfinished = out.with_suffix(".part")
        _run([python, BENCH / "random_gguf.py", shape, tokenizer, unfinished])
        unfinished.rename(out)
    return out


def int8_products(size: int = 2048) -> float:
    """Products of int8 numbers that torch adds up in a second, in its best of 8 square matrix products."""
    a, b = torch.randint(-127, 128, (2, size, size), dtype=torch.int8)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        torch._int_mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return size**3 / best


def read_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second with which all threads together read memory in huge pages: the best of 5 passes over 1 GiB."""
    data = Arena().copy(torch.ones(size // 4, dtype=torch.int32)).view(-1, 1 << 16)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        data.amax()
        best = min(best, time.perf_counter() - begin)
    return size / best


def _nibble(model: Path, name: str, *engine: str, size: Size = SMALL) -> dict[str, Any]:
    with console.status(f"{name}, offline"):
        output = _run(
            [
                sys.executable,
                BENCH / "offline.py",
                model,
                "--batches",
                *map(str, size.batches),
                "--prompt",
                str(size.prompt),
                "--tokens",
                str(size.tokens),
                "--engine",
                *engine,
            ]
        )
    row = json.loads(output.strip().splitlines()[-1])
    row["decode_tokens_per_second"] = {
        int(batch): rate for batch, rate in row["decode_tokens_per_second"].items()
    }
    return {"name": name} | row


def _llama(peer: Path, model: Path, name: str, size: Size = SMALL) -> dict[str, Any]:
    """llama.cpp's own benchmarks, in their default settings, on all cores."""
    with console.status(f"{name}, offline"):
        single = json.loads(
            _run(
                [
                    peers.llama(peer, "llama-bench"),
                    "-m",
                    model,
                    "-p",
                    str(size.prompt),
                    "-n",
                    str(size.tokens),
                    "-r",
                    "3",
                    "-o",
                    "json",
                ]
            )
        )
        batched = _run(
            [
                peers.llama(peer, "llama-batched-bench"),
                "-m",
                model,
                "-npp",
                "64",
                "-ntg",
                str(size.tokens),
                "-npl",
                ",".join(map(str, size.batches)),
                "-c",
                "8192",
            ]
        )
    best = {
        run["n_gen"] > 0: max(
            1e9 * (run["n_prompt"] + run["n_gen"]) / ns for ns in run["samples_ns"]
        )
        for run in single
    }
    rows = re.findall(
        r"^\|\s*64 \|\s*\d+ \|\s*(\d+) \|(?:[^|]*\|){4}\s*([\d.]+) \|", batched, re.MULTILINE
    )
    decode = {int(batch): float(rate) for batch, rate in rows} | {1: round(best[True], 1)}
    return {
        "name": name,
        "prefill_tokens_per_second": round(best[False], 1),
        "decode_tokens_per_second": decode,
    }


def _instruction_sets() -> list[str]:
    from nibble.kernels.cpu.library import instruction_sets

    return instruction_sets()


def _run(command: list[Any]) -> str:
    """Standard output. A failure ends the benchmark with the end of what the command said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{shlex.join(map(str, command))}\nexit code {done.returncode}\n{done.stderr[-2000:]}"
        )
    return done.stdout


def offline_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        "",
        "prefill, tok/s",
        *(f"decode of {batch}, tok/s" for batch in BATCHES),
        "share of bandwidth",
        f"share of int8 products, {BATCHES[-1]}",
    )
    for row in rows:
        decode = row["decode_tokens_per_second"]
        shown.add_row(
            row["name"],
            str(row["prefill_tokens_per_second"]),
            *(str(decode.get(b, "")) for b in BATCHES),
            *(
                f"{row[share]:.0%}" if share in row else ""
                for share in ("bandwidth_share", "products_share")
            ),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers", type=Path, default=machine.ROOT / ".cache" / "peers", help="their environments"
    )
    parser.add_argument(
        "--work", type=Path, default=machine.ROOT / ".cache" / "bench-cpu", help="the models"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    peers.install_llama(args.peers / "llama.cpp")
    models = {}
    if args.parts != ["families"]:
        peers.install(args.peers / "vllm")
        models = prepare(args.work, args.peers)
    result: dict[str, Any] = {
        "what": "a CPU: servers, engines, a larger model",
        **machine.describe(),
    }
    if "http" in args.parts:
        result["http"] = http(models, args.peers)
        Console(width=120).print(http_table(result["http"]))
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "offline": lambda: offline(models, args.peers),
        "large": lambda: large(models["large"], args.peers),
        "families": lambda: families(args.work, args.peers),
    }
    for part in (part for part in runs if part in args.parts):
        result[part] = runs[part]()
        Console(width=120).print(offline_table(result[part]))
    print(f"written to {machine.save('cpu', result).relative_to(machine.ROOT)}")


if __name__ == "__main__":
    main()
