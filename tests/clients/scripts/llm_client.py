"""The `llm` command, its model from extra-openai-models.yaml."""

import os
import subprocess
import sys
from pathlib import Path

from report import API_KEY, BASE_URL, MODEL, check, feature

HOME = Path(os.environ["SCRATCH"]) / "llm-home"
HOME.mkdir(exist_ok=True)
(HOME / "extra-openai-models.yaml").write_text(
    f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {BASE_URL}\n  api_key_name: ours\n"
    "  supports_schema: true\n  supports_tools: true\n"
)


def llm(*args: str) -> str:
    """What the command prints."""
    command = [str(Path(sys.executable).parent / "llm"), *args]
    environment = os.environ | {"LLM_USER_PATH": str(HOME)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


llm("keys", "set", "ours", "--value", API_KEY)


@feature("chat, streamed")
def _() -> None:
    check(llm("-m", "ours", "Say hello.", "-o", "max_tokens", "16").strip())


@feature("chat, whole")
def _() -> None:
    check(llm("-m", "ours", "Say hello.", "--no-stream", "-o", "max_tokens", "16").strip())


@feature("schema")
def _() -> None:
    said = llm("-m", "ours", "A dog.", "--schema", "age int, alive bool", "-o", "max_tokens", "300")
    check(said.strip().startswith("{"), said)


@feature("tools")
def _() -> None:
    code = 'def get_weather(city: str) -> str:\n    "The weather."\n    return "sunny"\n'
    said = llm(
        "-m", "ours", "Say hello.", "--functions", code, "--no-stream", "-o", "max_tokens", "60"
    )
    check(said is not None, said)
