"""openai, Python."""

import json

import openai
from pydantic import BaseModel
from report import (
    API_KEY,
    ASK,
    BASE_URL,
    CITIES,
    HELLO,
    MODEL,
    WEATHER,
    WEATHER_SCHEMA,
    check,
    feature,
)

client = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY)
CALL = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}


class Weather(BaseModel):
    city: str
    degrees: int


def chat(**fields):
    return client.chat.completions.create(model=MODEL, temperature=0, **fields)


@feature("chat")
def _() -> None:
    answer = chat(messages=HELLO, max_tokens=16)
    check(answer.choices[0].message.content and answer.usage.completion_tokens <= 16, answer)


@feature("stream")
def _() -> None:
    whole = chat(messages=HELLO, max_tokens=16).choices[0].message.content
    asked = {"messages": HELLO, "max_tokens": 16, "stream": True}
    chunks = list(chat(**asked, stream_options={"include_usage": True}))
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole)
    check(chunks[-1].usage.completion_tokens)


@feature("completions")
def _() -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=8, logprobs=1)
    check(answer.choices[0].text and len(answer.choices[0].logprobs.tokens) == 8, answer)


@feature("logprobs")
def _() -> None:
    answer = chat(messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3)
    check(all(len(t.top_logprobs) == 3 for t in answer.choices[0].logprobs.content), answer)


@feature("tools")
def _() -> None:
    (choice,) = chat(**CALL).choices
    call = choice.message.tool_calls[0]
    check(choice.finish_reason == "tool_calls" and call.function.name == "get_weather", choice)
    check(json.loads(call.function.arguments)["city"] in CITIES, call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20 degrees"}
    history = [*ASK, choice.message, result]
    check(chat(messages=history, tools=[WEATHER], max_tokens=24).choices[0].message)


@feature("tools, streamed")
def _() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[WEATHER], tool_choice=named, max_tokens=200
    ) as stream:
        final = stream.get_final_completion()
    arguments = json.loads(final.choices[0].message.tool_calls[0].function.arguments)
    check(arguments["city"] in CITIES, arguments)


@feature("JSON schema, parsed")
def _() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Weather, max_tokens=300
    )
    check(isinstance(answer.choices[0].message.parsed, Weather), answer)


@feature("JSON object")
def _() -> None:
    form = {"type": "json_object"}
    answer = chat(messages=ASK, response_format=form, max_tokens=120)
    check(answer.choices[0].message.content.startswith("{"), answer)


@feature("responses")
def _() -> None:
    first = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    check(first.output_text, first)
    asked = {"model": MODEL, "previous_response_id": first.id, "max_output_tokens": 16}
    check(client.responses.create(input="Again.", **asked).output_text)


@feature("responses, streamed")
def _() -> None:
    with client.responses.stream(model=MODEL, input="Say hello.") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        check(stream.get_final_response().output_text == text, text)


@feature("responses, tools")
def _() -> None:
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
    answer = client.responses.create(
        model=MODEL, input="Weather in Paris?", tools=[tool], tool_choice="required"
    )
    calls = [item for item in answer.output if item.type == "function_call"]
    check(json.loads(calls[0].arguments)["city"] in CITIES, calls)


@feature("embeddings")
def _() -> None:
    answer = client.embeddings.create(model=MODEL, input=["one", "two"])
    check(len(answer.data) == 2 and len(answer.data[0].embedding) == 576, answer.usage)


@feature("models")
def _() -> None:
    check(MODEL in [model.id for model in client.models.list()])


@feature("errors")
def _() -> None:
    for wrong, expected in (
        ({"model": "other", "messages": HELLO}, openai.NotFoundError),
        ({"model": MODEL, "messages": HELLO, "temperature": 11}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**wrong)
        except expected:
            continue
        check(False, f"no {expected}")
    try:
        openai.OpenAI(base_url=BASE_URL, api_key="wrong").models.list()
        check(False, "no error")
    except openai.AuthenticationError:
        pass
