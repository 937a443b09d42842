"""The Responses API: the official client against a real server, and the store by itself."""

import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from nibble.engine.text.parsers import Parsed, ToolCallDelta
from nibble.server.openai.responses.items import OutputItems
from nibble.server.openai.responses.schema import chat_messages
from nibble.server.openai.responses.store import ResponseStore, Stored

from .conftest import KEY, ServerProcess
from .test_tools import PARAMETERS

WEATHER = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client: openai.OpenAI, **fields):
    given = {"model": "tiny", "input": "Weather?", "max_output_tokens": 200, "temperature": 0.0}
    return client.responses.create(**given | fields)


def test_text_and_usage(client: openai.OpenAI) -> None:
    answer = ask(client, max_output_tokens=12, instructions="Be brief.", metadata={"a": "b"})
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert answer.metadata == {"a": "b"}
    assert answer.instructions == "Be brief."
    (message,) = answer.output
    assert message.content[0].text == answer.output_text


def test_what_was_found_in_the_cache_is_told(client: openai.OpenAI) -> None:
    said = "Twice the same words, of more than one block of the cache. " * 2
    first, again = (ask(client, input=said, max_output_tokens=2).usage for _ in range(2))
    assert again.input_tokens == first.input_tokens
    found = again.input_tokens_details.cached_tokens
    assert first.input_tokens_details.cached_tokens < found < again.input_tokens


def test_a_stream_has_every_event_and_comes_to_the_same(client: openai.OpenAI) -> None:
    wanted = {"format": {"type": "json_schema", "name": "f", "schema": PARAMETERS}}
    whole = ask(client, text=wanted)
    events = list(ask(client, text=wanted, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(deltas),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert set(json.loads(whole.output_text)) == {"city", "days"}


def test_calls_streamed_and_not(client: openai.OpenAI) -> None:
    fields = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "get_weather"},
    }
    (call,) = ask(client, **fields).output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    events = list(ask(client, **fields, stream=True))
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    assert events[-1].response.output[0].arguments == call.arguments


def test_a_response_can_be_gone_on_from(client: openai.OpenAI) -> None:
    first = ask(client, max_output_tokens=5)
    second = ask(client, input="And now?", previous_response_id=first.id, max_output_tokens=5)
    third = ask(client, input="And then?", previous_response_id=second.id, max_output_tokens=5)
    counts = [answer.usage.input_tokens for answer in (first, second, third)]
    turn = counts[1] - counts[0]
    assert turn > len("And now?") + len(first.output_text)
    assert counts[2] - counts[1] >= turn - 5
    items = client.responses.input_items.list(second.id).data
    assert [item.content[0].text for item in items] == ["And now?"]


def test_what_is_stored_can_be_read_and_deleted(client: openai.OpenAI) -> None:
    made = ask(client, max_output_tokens=5)
    assert client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match="Previous response"):
        ask(client, previous_response_id=made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    made = ask(client, max_output_tokens=5, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_in_the_background(client: openai.OpenAI) -> None:
    made = ask(client, background=True, max_output_tokens=5)
    assert made.status == "in_progress"
    for _ in range(100):
        found = client.responses.retrieve(made.id)
        if found.status != "in_progress":
            break
        time.sleep(0.05)
    assert found.status == "incomplete" and found.usage.output_tokens == 5


def test_a_background_response_can_be_cancelled(client: openai.OpenAI, server) -> None:
    made = ask(client, background=True, max_output_tokens=8000, temperature=1.0)
    assert client.responses.cancel(made.id).status in ("cancelled", "completed", "incomplete")
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == 0:
            break
        time.sleep(0.05)
    assert server.metric("vllm:num_requests_running") == 0
    stored = ask(client, max_output_tokens=5)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(stored.id)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"input": []}, 400),
        ({"input": [{"type": "image"}]}, 400),
        ({"tools": [{"type": "web_search"}]}, 400),
        ({"model": "no-such"}, 404),
        ({"background": True, "store": False}, 400),
        ({"text": {"format": {"type": "json_schema", "name": "f", "schema": {"not": {}}}}}, 400),
    ],
)
def test_what_is_not_supported_is_refused(http: httpx.Client, fields: dict, status: int) -> None:
    given = {"model": "tiny", "input": "x", "max_output_tokens": 5, **fields}
    answer = http.post("/v1/responses", json=given)
    assert answer.status_code == status and answer.json()["error"]["message"]


# Without a server


def test_items_become_messages_in_the_order_of_turns() -> None:
    text = [{"type": "output_text", "text": "Let me see."}]
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"text": "hm"}]},
        {"type": "message", "role": "assistant", "content": text},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "reasoning", "summary": [{"text": "so"}]},
        {"type": "message", "role": "assistant", "content": "b"},
        {"type": "message", "role": "assistant", "content": "c"},
    ]
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": i, "type": "function", "function": function} for i in "12"]
    assert chat_messages(items) == [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "Let me see.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "assistant", "reasoning_content": "so", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]


def test_items_of_an_answer_that_thinks_says_and_calls() -> None:
    items = OutputItems("x")
    news = [
        Parsed(reasoning="a"),
        Parsed(reasoning="b"),
        Parsed(content="c"),
        Parsed(tool_calls=[ToolCallDelta(0, "id", "f", '{"a"'), ToolCallDelta(0, arguments=":1}")]),
        Parsed(tool_calls=[ToolCallDelta(1, "id2", "g", "{}")]),
    ]
    events = [name for one in news for name, _ in items.take(one, [])]
    events += [name for name, _ in items.end("completed")]
    assert events == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", *["function_call_arguments.delta"] * 2),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
    ]
    assert [item["type"] for item in items.items] == ["reasoning", "message"] + [
        "function_call"
    ] * 2
    assert items.items[0]["content"][0]["text"] == "ab"
    assert [item.get("arguments") for item in items.items[2:]] == ['{"a":1}', "{}"]
    assert {item["status"] for item in items.items} == {"completed"}


def stored(name: str, text: str = "") -> Stored:
    return Stored({"id": name, "output": [{"text": text}]}, [{"a": 1}], [{"b": 2}])


def test_the_store_is_bounded_and_apart_for_each_key() -> None:
    store = ResponseStore(max_responses=2)
    for name in ("a", "b"):
        store.put(b"me", stored(name))
    assert store.get(b"me", "a").items() == [{"b": 2}, {"a": 1}, {"text": ""}]
    store.put(b"me", stored("c"))  # the one that nobody has asked for the longest goes
    assert store.get(b"me", "b") is None and store.get(b"me", "a") is not None
    assert store.get(b"you", "a") is None
    assert store.delete(b"me", "a") and not store.delete(b"me", "a")


def test_the_store_is_bounded_in_bytes() -> None:
    store = ResponseStore(max_bytes=1000)
    store.put(b"", stored("a", "x" * 500))
    store.put(b"", stored("b", "x" * 500))
    assert store.get(b"", "a") is None and store.get(b"", "b") is not None
    store.put(b"", stored("b", "x" * 10))
    store.put(b"", stored("c", "x" * 600))
    assert store.get(b"", "b") is not None
