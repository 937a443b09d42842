"""anthropic, Python."""

import anthropic
from report import API_KEY, ASK, CITIES, HELLO, MODEL, SERVER_URL, WEATHER_SCHEMA, check, feature

client = anthropic.Anthropic(base_url=SERVER_URL, api_key=API_KEY)
TOOL = {"name": "get_weather", "description": "The weather", "input_schema": WEATHER_SCHEMA}
CALL = {"messages": ASK, "tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 200}


@feature("chat")
def _() -> None:
    answer = client.messages.create(
        model=MODEL, messages=HELLO, max_tokens=16, system="Be brief.", stop_sequences=["zzz"]
    )
    check(answer.content[0].text and answer.usage.output_tokens <= 16, answer)
    check(answer.stop_reason in ("end_turn", "max_tokens"), answer)


@feature("stream")
def _() -> None:
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=16) as stream:
        text = "".join(stream.text_stream)
        check(stream.get_final_message().content[0].text == text, text)


@feature("tools")
def _() -> None:
    answer = client.messages.create(model=MODEL, **CALL)
    block = answer.content[-1]
    check(answer.stop_reason == "tool_use" and block.input["city"] in CITIES, answer)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    history = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=24)
    check(after.role == "assistant", after)


@feature("tools, streamed")
def _() -> None:
    with client.messages.stream(model=MODEL, **CALL) as stream:
        final = stream.get_final_message()
    check(final.content[-1].input["city"] in CITIES, final)


@feature("count tokens")
def _() -> None:
    check(client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 3)


@feature("models")
def _() -> None:
    check(MODEL in [model.id for model in client.models.list()])


@feature("errors")
def _() -> None:
    try:
        client.messages.create(model="other", messages=HELLO, max_tokens=4)
        check(False, "no error")
    except anthropic.NotFoundError:
        pass
    try:
        wrong = anthropic.Anthropic(base_url=SERVER_URL, api_key="wrong")
        wrong.messages.create(model=MODEL, messages=HELLO, max_tokens=4)
        check(False, "no error")
    except anthropic.AuthenticationError:
        pass
