"""tool_choice "required" on a real model: 200 of 200 calls, at temperature 1, are of a tool that is there and have
arguments that its schema allows. `make test-schemas`."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from nibble.tools.fetch import smollm2_gguf

from .conftest import ServerProcess

pytestmark = pytest.mark.network

WEATHER = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "City and country"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["location"],
}
SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "minLength": 1, "maxLength": 80},
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        "since": {"type": "string", "format": "date"},
    },
    "required": ["query", "limit"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"type": "integer", "minimum": 1},
                },
                "required": ["sku", "count"],
                "additionalProperties": False,
            },
        },
        "gift": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string", "maxLength": 60}, {"type": "null"}]},
    },
    "required": ["items", "gift", "note"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "search_web": SEARCH, "place_order": ORDER, "get_time": NOTHING}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASKED = [
    "What is the weather in Paris?",
    "Find me three articles on whales since 2020.",
    "Order two of ABC-1234, it is a present.",
    "What time is it?",
    "Tell me a joke.",
]


def asked(client: openai.OpenAI, seed: int) -> str:
    """ "ok", or what is wrong with the call."""
    few = TOOLS[seed % 4 :] if seed % 2 else TOOLS
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": ASKED[seed % len(ASKED)]}],
        tools=few,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.0,
        seed=seed,
        max_tokens=2000,
    )
    (choice,) = answer.choices
    if choice.finish_reason != "tool_calls":
        return f"ends by {choice.finish_reason}: {choice.message!r:.2000}"
    (call,) = choice.message.tool_calls
    if call.function.name not in {tool["function"]["name"] for tool in few}:
        return f"calls {call.function.name}"
    schema = SCHEMAS[call.function.name]
    valid = jsonschema_rs.validator_for(schema).is_valid(json.loads(call.function.arguments))
    return "ok" if valid else f"{call.function.name}({call.function.arguments})"


@pytest.mark.timeout(1200)
def test_200_calls_of_200_are_valid(start_server: Callable[..., ServerProcess]) -> None:
    model = smollm2_gguf(Path(__file__).parents[2] / "models")
    server = start_server(model, "--served-model-name", "smollm2").wait_ready()
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client,
        ThreadPoolExecutor(16) as threads,
    ):
        found = Counter(threads.map(lambda seed: asked(client, seed), range(200)))
    assert found == {"ok": 200}
