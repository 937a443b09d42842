"""lm_eval: choices by log-probabilities with the server's tokenizer, and generation by chat."""

import json
import os
import subprocess
import sys
from pathlib import Path

from report import API_KEY, BASE_URL, MODEL, check, feature

FOLDER = Path(os.environ["SCRATCH"]) / "tasks"
FOLDER.mkdir(exist_ok=True)
QUESTIONS = [{"question": f"Is {n} even?", "label": n % 2} for n in range(6)]
(FOLDER / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
DATA = {"test": str(FOLDER / "questions.jsonl")}
COMMON = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": DATA},
    "test_split": "test",
    "doc_to_text": "{{question}} Answer:",
}
CHOICES = COMMON | {
    "task": "evens",
    "output_type": "multiple_choice",
    "doc_to_choice": ["yes", "no"],
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATED = COMMON | {
    "task": "evens_said",
    "output_type": "generate_until",
    "doc_to_target": "{{'yes' if label == 0 else 'no'}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
REMOTE = {"tokenizer_backend": "remote", "auth_token": API_KEY}
for task in (CHOICES, GENERATED):  # JSON is YAML
    (FOLDER / f"{task['task']}.yaml").write_text(json.dumps(task))


def evaluate(kind: str, path: str, task: str, *flags: str, **args: object) -> dict:
    """The results of a task."""
    given = {"model": MODEL, "base_url": f"{BASE_URL}/{path}", "num_concurrent": 2} | args
    joined = ",".join(f"{name}={value}" for name, value in given.items())
    out = FOLDER / f"{kind}-{task}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", joined]
    command += ["--tasks", task, "--include_path", str(FOLDER), "--output_path", str(out), *flags]
    environment = os.environ | {"OPENAI_API_KEY": API_KEY, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, done.stderr[-2000:].strip().splitlines()[-1:] or done.stdout[-300:])
    newest = max(out.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())["results"][task]


@feature("completions, choices, tokenizer_backend=remote")
def _() -> None:
    found = evaluate("local-completions", "completions", "evens", **REMOTE)
    check(0 <= found["acc,none"] <= 1, found)


@feature("completions, generated")
def _() -> None:
    found = evaluate("local-completions", "completions", "evens_said", **REMOTE)
    check("exact_match,none" in found, found)


@feature("chat, generated")
def _() -> None:
    chat = ("local-chat-completions", "chat/completions", "evens_said", "--apply_chat_template")
    check("exact_match,none" in evaluate(*chat))
