"""huggingface_hub's InferenceClient: text generation, chat, tools, JSON, embeddings."""

import json

from huggingface_hub import InferenceClient
from report import (
    API_KEY,
    ASK,
    CITIES,
    HELLO,
    MODEL,
    SERVER_URL,
    WEATHER,
    WEATHER_SCHEMA,
    check,
    feature,
)

client = InferenceClient(base_url=SERVER_URL, api_key=API_KEY)


@feature("text generation")
def _() -> None:
    text = client.text_generation("One, two,", max_new_tokens=8)
    check(text)
    whole = client.text_generation("One, two,", max_new_tokens=8, details=True)
    check(whole.generated_text == text and len(whole.details.tokens) == 8, whole)


@feature("text generation, streamed")
def _() -> None:
    asked = {"max_new_tokens": 8, "stream": True}
    text = "".join(client.text_generation("One, two,", **asked))
    check(text == client.text_generation("One, two,", max_new_tokens=8), text)


@feature("chat")
def _() -> None:
    answer = client.chat_completion(HELLO, model=MODEL, max_tokens=16)
    check(answer.choices[0].message.content, answer)
    check(client.chat_completion(HELLO, max_tokens=16).choices[0].message.content)


@feature("chat, streamed")
def _() -> None:
    chunks = client.chat_completion(HELLO, model=MODEL, max_tokens=16, stream=True)
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))


@feature("tools")
def _() -> None:
    asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    answer = client.chat_completion(ASK, model=MODEL, **asked)
    arguments = answer.choices[0].message.tool_calls[0].function.arguments
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    check(arguments["city"] in CITIES, arguments)


@feature("JSON schema")
def _() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER_SCHEMA}}
    answer = client.chat_completion(ASK, model=MODEL, response_format=form, max_tokens=200)
    check(json.loads(answer.choices[0].message.content)["city"] in CITIES, answer)
