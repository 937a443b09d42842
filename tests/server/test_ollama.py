"""Ollama's endpoints against a real server process, by raw HTTP; the model's tokens are bytes."""

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from nibble.engine.sampling_params import SamplingParams
from nibble.engine.text.chat_output import OutputFormat
from nibble.engine.text.parsers import TOOL_PARSERS, Tool
from nibble.engine.text.tokenizer import Tokenizer
from nibble.server.generation import Delta, Sequence
from nibble.server.ollama.answer import LinesAnswer
from nibble.server.ollama.schema import ChatBody

from .conftest import KEY, ServerProcess

HEADERS = {"Authorization": f"Bearer {KEY}"}
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "num_predict": 12}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    given = {"model": "tiny", "options": GREEDY} | body
    return httpx.post(f"{server.url}{path}", json=given, headers=HEADERS, timeout=60)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def openai(server: ServerProcess, path: str, **body: Any) -> Any:
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0} | body
    answer = httpx.post(f"{server.url}/v1/{path}", json=given, headers=HEADERS, timeout=60)
    return answer.json()


def test_a_chat_whole_and_in_lines(server: ServerProcess) -> None:
    want = openai(server, "chat/completions", messages=HELLO)
    whole = post(server, "/api/chat", messages=HELLO, stream=False).json()
    assert whole["message"] == {
        "role": "assistant",
        "content": want["choices"][0]["message"]["content"],
    }
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "length", "tiny")
    assert whole["prompt_eval_count"] == want["usage"]["prompt_tokens"]
    assert whole["eval_count"] == 12
    assert whole["total_duration"] >= whole["prompt_eval_duration"] > 0
    streamed = lines(post(server, "/api/chat", messages=HELLO))  # it streams unless told not to
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    said = "".join(line["message"]["content"] for line in streamed)
    assert said == whole["message"]["content"]
    assert streamed[-1]["eval_count"] == 12 and streamed[-1]["eval_duration"] > 0


def test_generate_by_the_template_or_raw(server: ServerProcess) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    want = openai(server, "chat/completions", messages=chat)["choices"][0]["message"]["content"]
    asked = {"prompt": "Hello", "system": "Be brief."}
    assert post(server, "/api/generate", **asked, stream=False).json()["response"] == want
    streamed = lines(post(server, "/api/generate", **asked))
    assert "".join(line["response"] for line in streamed) == want
    raw = openai(server, "completions", prompt="Hello")["choices"][0]["text"]
    assert (
        post(server, "/api/generate", prompt="Hello", raw=True, stream=False).json()["response"]
        == raw
    )


def test_options_are_those_of_our_requests(server: ServerProcess) -> None:
    options = {"seed": 4, "num_predict": 20, "top_k": 7, "top_p": 0.8, "repeat_penalty": 1.3}
    same = {"seed": 4, "max_tokens": 20, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.3}
    want = openai(server, "completions", prompt="Hi", **same, temperature=0.8)["choices"][0]["text"]
    asked = {"prompt": "Hi", "raw": True, "stream": False}
    machine = {"num_ctx": 4096, "num_thread": 4, "use_mmap": True, "mirostat": 0}
    answer = post(server, "/api/generate", **asked, options=options | machine, keep_alive="5m")
    assert answer.json()["response"] == want
    unlimited = post(server, "/api/generate", **asked, options={"num_predict": -1, "stop": ["e"]})
    limit = httpx.get(f"{server.url}/api/ps", headers=HEADERS).json()["models"][0]["context_length"]
    assert unlimited.json()["done_reason"] == "stop" or unlimited.json()["eval_count"] == limit - 2


def test_json_and_schemas(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    asked = {"messages": HELLO, "stream": False, "options": {"temperature": 0, "num_predict": 60}}
    said = post(server, "/api/chat", **asked, format=schema).json()["message"]["content"]
    assert jsonschema_rs.is_valid(schema, json.loads(said))
    begun = post(server, "/api/chat", **asked, format="json").json()["message"]["content"]
    assert begun.startswith("{")


def test_tools_and_results_of_the_history(server: ServerProcess) -> None:
    call = {"function": {"name": "weather", "arguments": {"place": "Paris"}}}
    result = {"role": "tool", "content": "rain", "tool_name": "weather"}
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    messages += [result, result]
    answer = post(server, "/api/chat", messages=messages, tools=[WEATHER], stream=False)
    ours = [
        {"id": f"call_1_{i}", "type": "function"}
        | {"function": {"name": "weather", "arguments": '{"place":"Paris"}'}}
        for i in range(2)
    ]
    history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": ours}]
    history += [
        {"role": "tool", "content": "rain", "tool_call_id": f"call_1_{i}"} for i in range(2)
    ]
    want = openai(server, "chat/completions", messages=history, tools=[WEATHER])
    assert answer.json()["message"]["content"] == want["choices"][0]["message"]["content"]
    assert answer.json()["prompt_eval_count"] == want["usage"]["prompt_tokens"]


def test_calls_come_whole_with_arguments_as_objects(tiny_llama: Path) -> None:
    said = 'Well. <tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
    form = OutputFormat(TOOL_PARSERS["hermes"], None)
    tools = [Tool.of(WEATHER)]
    body = ChatBody(model="tiny", messages=HELLO, tools=[WEATHER]).chat()
    tokenizer = Tokenizer.from_pretrained(tiny_llama)
    sequence = Sequence(0, [1, 2], SamplingParams(), tokenizer, frozenset())
    for cut in (1, 7, len(said)):
        answer = LinesAnswer(body, "tiny", lambda: form.parser(tools, ""), True)
        pieces = [said[i : i + cut] for i in range(0, len(said), cut)]
        news = [Delta(sequence, piece, None, [], None) for piece in pieces]
        events = b"".join(map(answer.event, [*news, Delta(sequence, "", None, [], "stop")]))
        found = [json.loads(line)["message"] for line in events.splitlines()]
        assert "".join(message["content"] for message in found).strip() == "Well."
        calls = [call["function"] for message in found for call in message.get("tool_calls", [])]
        assert calls == [{"name": "weather", "arguments": {"place": "Rome"}}]


def test_what_it_is(server: ServerProcess) -> None:
    tags = httpx.get(f"{server.url}/api/tags", headers=HEADERS).json()["models"]
    assert [entry["name"] for entry in tags] == ["tiny", "alias"]
    shown = post(server, "/api/show", options=None).json()
    assert shown["capabilities"][:1] == ["completion"] and "tools" in shown["capabilities"]
    assert shown["model_info"]["nibble.context_length"] > 0
    assert httpx.get(f"{server.url}/api/ps", headers=HEADERS).json()["models"][0]["model"] == "tiny"
    number = httpx.get(f"{server.url}/api/version", headers=HEADERS).json()["version"]
    assert [int(part) >= 0 for part in number.split(".")] == [True] * 3


def test_a_model_by_its_tag_and_a_request_for_nothing(server: ServerProcess) -> None:
    loaded = post(server, "/api/generate", model="tiny:latest").json()
    assert (loaded["done"], loaded["done_reason"], loaded["response"]) == (True, "load", "")
    assert post(server, "/api/chat", messages=[]).json()["done_reason"] == "load"


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/api/chat", {"model": "other", "messages": HELLO}, 404, "other"),
        ("/api/chat", {"messages": HELLO, "format": "xml"}, 400, "format"),
        ("/api/chat", {"messages": HELLO, "options": {"mirostat": 2}}, 400, "mirostat"),
        ("/api/chat", {"messages": HELLO, "options": {"nonsense": 2}}, 400, "nonsense"),
        ("/api/chat", {"messages": [HELLO[0] | {"images": ["aGk="]}]}, 400, "images"),
        ("/api/generate", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/api/show", {"model": "other", "options": None}, 404, "other"),
    ],
)
def test_errors_are_in_ollamas_shape(
    server: ServerProcess, path: str, body: dict, status: int, named: str
) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    assert named in answer.json()["error"]
