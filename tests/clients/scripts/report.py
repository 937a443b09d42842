"""What every script has: the server it is told of, a tool, a form of answers, and `feature`, which reports."""

import json
import os
import sys
import traceback
from collections.abc import Callable

BASE_URL, SERVER_URL = os.environ["BASE_URL"], os.environ["SERVER_URL"]
API_KEY, MODEL = os.environ["API_KEY"], os.environ["MODEL"]
CITIES = ["Paris", "Rome", "Oslo"]
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": WEATHER_SCHEMA,
    },
}
HELLO = [{"role": "user", "content": "Say hello."}]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def feature(name: str) -> Callable[[Callable[[], None]], None]:
    """Runs what it decorates, and prints whether it held."""

    def run(check: Callable[[], None]) -> None:
        try:
            check()
            print(json.dumps({"feature": name, "ok": True}), flush=True)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            line = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
            print(json.dumps({"feature": name, "ok": False, "why": line[:300]}), flush=True)

    return run


def check(condition: object, what: object = "") -> None:
    """AssertionError with `what` unless the condition holds."""
    if not condition:
        raise AssertionError(what)
