"""litellm, by its openai, anthropic and text-completion providers."""

import json

import litellm
from pydantic import BaseModel
from report import (
    API_KEY,
    ASK,
    BASE_URL,
    CITIES,
    HELLO,
    MODEL,
    SERVER_URL,
    WEATHER,
    check,
    feature,
)

OURS = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": API_KEY}


class Weather(BaseModel):
    city: str
    degrees: int


@feature("chat")
def _() -> None:
    answer = litellm.completion(**OURS, messages=HELLO, max_tokens=16)
    check(answer.choices[0].message.content and answer.usage.completion_tokens, answer)


@feature("stream")
def _() -> None:
    chunks = litellm.completion(**OURS, messages=HELLO, max_tokens=16, stream=True, temperature=0)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check(text, text)


@feature("tools")
def _() -> None:
    asked = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    call = litellm.completion(**OURS, **asked).choices[0].message.tool_calls[0]
    check(json.loads(call.function.arguments)["city"] in CITIES, call)


@feature("JSON schema")
def _() -> None:
    answer = litellm.completion(**OURS, messages=ASK, response_format=Weather, max_tokens=300)
    check(Weather.model_validate_json(answer.choices[0].message.content))


@feature("Messages API")
def _() -> None:
    ours = {"model": f"anthropic/{MODEL}", "api_base": SERVER_URL, "api_key": API_KEY}
    check(litellm.completion(**ours, messages=HELLO, max_tokens=16).choices[0].message.content)


@feature("completions")
def _() -> None:
    ours = OURS | {"model": f"text-completion-openai/{MODEL}"}
    check(litellm.text_completion(**ours, prompt="One, two,", max_tokens=8).choices[0].text)


@feature("embeddings")
def _() -> None:
    answer = litellm.embedding(**OURS, input=["one", "two"])
    check(len(answer.data) == 2, answer)


@feature("errors")
def _() -> None:
    try:
        litellm.completion(**OURS, messages=HELLO, temperature=11)
    except litellm.BadRequestError:
        return
    check(False, "no error")
