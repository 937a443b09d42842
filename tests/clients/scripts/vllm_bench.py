"""`vllm bench serve` with random prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from report import API_KEY, MODEL, SERVER_URL, check, feature

FOLDER = Path(os.environ["SCRATCH"])


def bench(*flags: str) -> dict:
    """The results of a short run."""
    out = FOLDER / "bench.json"
    out.unlink(missing_ok=True)
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve"]
    command += ["--base-url", SERVER_URL, "--model", MODEL, "--tokenizer", os.environ["TOKENIZER"]]
    command += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "12"]
    command += ["--num-prompts", "4", "--save-result", "--result-filename", str(out), *flags]
    environment = os.environ | {"OPENAI_API_KEY": API_KEY, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, (done.stderr or done.stdout).strip().splitlines()[-1:])
    return json.loads(out.read_text())


@feature("completions")
def _() -> None:
    found = bench("--ignore-eos")
    check(found["completed"] == 4 and found["total_output_tokens"] == 48, found)


@feature("chat")
def _() -> None:
    chat = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
    check(bench(*chat)["completed"] == 4)
