"""guidellm: synthetic prompts, one after the other and at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from report import API_KEY, MODEL, SERVER_URL, check, feature

FOLDER = Path(os.environ["SCRATCH"])


def run(profile: str) -> dict:
    """The report of a short run."""
    out = FOLDER / "benchmarks.json"
    out.unlink(missing_ok=True)
    backend = f"kind=openai_http,target={SERVER_URL},model={MODEL},api_key={API_KEY}"
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += ["--backend", backend, "--profile", profile]
    command += ["--constraint", "kind=max_requests,count=4"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12"]
    command += ["--output", f"kind=json,path={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, (done.stderr or done.stdout).strip().splitlines()[-1:])
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    return benchmark


@feature("one after the other")
def _() -> None:
    check(run("kind=synchronous")["metrics"]["request_totals"]["successful"] == 4)


@feature("at once")
def _() -> None:
    check(run("kind=concurrent,streams=2")["metrics"]["request_totals"]["successful"] == 4)
