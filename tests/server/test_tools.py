"""Tools and structured output over HTTP: the official client against a real server.

The model is random, so what it says is held to a grammar: by the server, where calls are required, or by the test,
which makes it say a text that holds a call.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import jsonschema_rs
import openai
import pytest

from nibble.engine.grammar.structured_outputs import StructuredOutputs
from nibble.server import limits
from nibble.server.errors import ApiError
from nibble.server.openai.structured import compiled
from nibble.server.serving import Serving

from .conftest import KEY, ServerProcess

ASK = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Forecast", "parameters": PARAMETERS},
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client


def chat(client: openai.OpenAI, **fields):
    given = {"model": "tiny", "messages": ASK, "max_tokens": 300, "seed": 7} | fields
    return client.chat.completions.create(**given)


def saying(text: str) -> dict:
    """Request fields that make the model say this."""
    return {"extra_body": {"structured_outputs": {"regex": re.escape(text)}}}


def streamed(chunks) -> tuple[str, list[dict], str | None]:
    """Content, calls and finish_reason of a stream."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.function.name is not None:
                assert call.index == len(calls)
                assert call.id and call.type == "function"
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


def test_required_calls_validate_streamed_or_not(client: openai.OpenAI) -> None:
    validator = jsonschema_rs.validator_for(PARAMETERS)
    for seed in range(8):
        fields = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "seed": seed}
        choice = chat(client, **fields).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        calls = [
            {"name": call.function.name, "arguments": call.function.arguments}
            for call in choice.message.tool_calls
        ]
        assert calls and len({call.id for call in choice.message.tool_calls}) == len(calls)
        for call in calls:
            assert call["name"] in ("get_weather", "clock")
            if call["name"] == "get_weather":
                validator.validate(json.loads(call["arguments"]))
        assert streamed(chat(client, **fields, stream=True)) == ("", calls, "tool_calls")


def test_one_call_where_one_is_named_or_several_are_not_wanted(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    for choice in (named, "required"):
        for seed in range(4):
            answer = chat(
                client,
                tools=[WEATHER, CLOCK],
                tool_choice=choice,
                parallel_tool_calls=False,
                seed=seed,
            )
            (call,) = answer.choices[0].message.tool_calls
            assert choice == "required" or call.function.name == "clock"


def test_a_call_among_text_is_found(client: openai.OpenAI) -> None:
    says = saying(f"Let me see.\n{CALL}")
    choice = chat(client, tools=[WEATHER], **says).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.message.content == "Let me see."
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 2}
    assert choice.finish_reason == "tool_calls"
    content, calls, reason = streamed(chat(client, tools=[WEATHER], stream=True, **says))
    assert (content, reason) == ("Let me see.", "tool_calls")
    assert calls == [{"name": "get_weather", "arguments": call.function.arguments}]


def test_without_tools_it_is_text(client: openai.OpenAI) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = chat(client, **fields, **saying(CALL)).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
        assert choice.finish_reason == "stop"


def test_a_call_that_is_cut_off_is_told_as_such(client: openai.OpenAI) -> None:
    choice = chat(client, tools=[WEATHER], max_tokens=40, **saying(CALL)).choices[0]
    assert choice.finish_reason == "length"


def test_a_history_of_calls_is_in_the_prompt(client: openai.OpenAI) -> None:
    answer = chat(client, tools=[WEATHER], **saying(CALL))
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    history = [*ASK, message.model_dump(exclude_none=True), result]
    with_result = chat(client, messages=history, tools=[WEATHER], max_tokens=1)
    without = chat(client, messages=ASK, tools=[WEATHER], max_tokens=1)
    more = with_result.usage.prompt_tokens - without.usage.prompt_tokens
    assert more > len("get_weather") + len("sunny") + len(json.dumps({"city": "Rome", "days": 2}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "there are no 'tools'"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "no_such"}},
            },
            "'no_such', which is not one of the 'tools'",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
                ],
                "tool_choice": "required",
            },
            "not",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(client: openai.OpenAI, fields, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **fields)


# Structured output


def test_an_object_of_a_schema(client: openai.OpenAI) -> None:
    schema = {"name": "forecast", "strict": True, "schema": PARAMETERS}
    wanted = {"type": "json_schema", "json_schema": schema}
    validator = jsonschema_rs.validator_for(PARAMETERS)
    for seed in range(4):
        choice = chat(client, response_format=wanted, seed=seed).choices[0]
        validator.validate(json.loads(choice.message.content))
        assert choice.finish_reason == "stop"
        chunks = chat(client, response_format=wanted, seed=seed, stream=True)
        assert streamed(chunks)[0] == choice.message.content


def test_samples_with_a_seed_are_each_its_own(client: openai.OpenAI) -> None:
    answer = chat(client, n=4, extra_body={"structured_outputs": {"regex": "[a-z]{12}"}})
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 4 and all(re.fullmatch("[a-z]{12}", text) for text in texts)
    again = chat(client, n=4, extra_body={"guided_regex": "[a-z]{12}"})
    assert [choice.message.content for choice in again.choices] == texts


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"const": 17}}}, "17"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_json": '{"const": 17}'}, "17"),
        ({"guided_grammar": 'start: "a" "b"'}, "ab"),
        ({"grammar": 'root ::= "a" [0-9]'}, r"a\d"),
        ({"json_schema": {"enum": [1, 2]}}, "1|2"),
    ],
)
def test_every_spelling_in_both_endpoints(http: httpx.Client, body: dict, pattern: str) -> None:
    common = {"model": "tiny", "max_tokens": 40, **body}
    for path, given in (
        ("/v1/chat/completions", {"messages": ASK}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        choice = http.post(path, json={**common, **given}).raise_for_status().json()["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"json_schema": {"uniqueItems": True}}, "json_schema", "uniqueItems"),
        ({"guided_json": {"type": "x"}, "grammar": "start: /a/"}, "grammar", "exclude each other"),
    ],
)
def test_what_cannot_be_kept_to_is_a_400_before_a_stream_begins(
    http: httpx.Client, body: dict, param: str, words: str
) -> None:
    for stream in (False, True):
        given = {"model": "tiny", "messages": ASK, "stream": stream, **body}
        answer = http.post("/v1/chat/completions", json=given)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"].split(".")[0]) == (400, param)
        assert words in error["message"]


def test_grammars_that_wait_to_be_compiled_are_bounded() -> None:
    """Of a stand-in for an engine that is busy with others."""
    serving = Serving(("m",))
    engine = SimpleNamespace(is_alive=True, num_compiling=limits.MAX_COMPILING)
    nothing = SimpleNamespace()
    serving.ready(engine, nothing, nothing, nothing)
    with pytest.raises(ApiError) as refused:
        asyncio.run(compiled(serving, StructuredOutputs(regex="a"), "grammar"))
    assert refused.value.status == 503
