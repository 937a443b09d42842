"""Anthropic's Messages API: the official client against a real server."""

import json
from collections.abc import Iterator

import anthropic
import httpx
import pytest

from .conftest import KEY, ServerProcess
from .test_tools import PARAMETERS

GREEDY = {"temperature": 0.0}
ASK = [{"role": "user", "content": "Weather?"}]
WEATHER = {"name": "get_weather", "description": "Forecast", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ask(client: anthropic.Anthropic, **fields):
    given = {"model": "tiny", "messages": ASK, "max_tokens": 200} | fields
    return client.messages.create(**given)


def test_text_and_usage(client: anthropic.Anthropic) -> None:
    answer = ask(client, max_tokens=12, system="Be brief.")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert answer.id.startswith("msg_")
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 12
    counted = client.messages.count_tokens(model="tiny", messages=ASK, system="Be brief.")
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_what_was_found_in_the_cache_is_counted_apart(client: anthropic.Anthropic) -> None:
    said = [{"role": "user", "content": "The same words twice, a block of them and more. " * 2}]
    first, again = (ask(client, messages=said, max_tokens=2).usage for _ in range(2))
    assert again.cache_read_input_tokens > first.cache_read_input_tokens
    assert again.input_tokens < first.input_tokens
    whole = client.messages.count_tokens(model="tiny", messages=said).input_tokens
    assert again.input_tokens + again.cache_read_input_tokens == whole


def test_the_system_prompt_is_part_of_the_prompt(client: anthropic.Anthropic) -> None:
    def count(**fields) -> int:
        return client.messages.count_tokens(model="tiny", messages=ASK, **fields).input_tokens

    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert count(system=blocks) == count(system="Be brief.") > count()
    assert count(tools=[WEATHER]) > count() + len("get_weather")


def test_a_stream_comes_to_the_same(client: anthropic.Anthropic) -> None:
    given = {"model": "tiny", "messages": ASK, "max_tokens": 40, "extra_body": GREEDY}
    whole = client.messages.create(**given)
    with client.messages.stream(**given) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_stop_sequences_are_named(client: anthropic.Anthropic) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("p"))]
    answer = ask(client, stop_sequences=letters, max_tokens=200)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence in letters


def test_calls_streamed_and_not(client: anthropic.Anthropic) -> None:
    fields = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    answer = ask(client, extra_body=GREEDY, **fields)
    (block,) = answer.content
    assert (block.type, block.name, answer.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert set(block.input) == {"city", "days"}
    given = {"model": "tiny", "messages": ASK, "max_tokens": 200, **fields}
    given["extra_body"] = GREEDY
    with client.messages.stream(**given) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    assert final.stop_reason == "tool_use"


def test_results_go_back(client: anthropic.Anthropic) -> None:
    fields = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}}
    answer = ask(client, **fields)
    call = answer.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": False}
    history = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]

    def count(messages) -> int:
        counted = client.messages.count_tokens(model="tiny", messages=messages, tools=[WEATHER])
        return counted.input_tokens

    assert count(history) > count(ASK) + len(json.dumps(call.input)) + len("sunny") + len(
        "And now?"
    )
    ask(client, messages=history, tools=[WEATHER], max_tokens=2)


def test_an_answer_of_a_schema(http: httpx.Client) -> None:
    schema = {"type": "json_schema", "schema": {"const": 1}}
    given = {
        "model": "tiny",
        "messages": ASK,
        "max_tokens": 20,
        "output_config": {"format": schema},
    }
    answer = http.post("/v1/messages", json=given).raise_for_status().json()
    assert answer["content"] == [{"type": "text", "text": "1"}]


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"model": "no-such"}, 404, "not_found_error"),
        ({"no_such_field": 1}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
        ),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
    ],
)
def test_errors_have_their_shape(http: httpx.Client, fields: dict, status: int, kind: str) -> None:
    given = {"model": "tiny", "messages": ASK, "max_tokens": 5, **fields}
    answer = http.post("/v1/messages", json=given)
    assert answer.status_code == status
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind


def test_a_wrong_key_is_refused(server: ServerProcess) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with client, pytest.raises(anthropic.AuthenticationError):
        ask(client)
