"""ollama, Python."""

import ollama
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

client = ollama.Client(SERVER_URL, headers={"Authorization": f"Bearer {API_KEY}"})
SHORT = {"num_predict": 16, "temperature": 0}


@feature("chat")
def _() -> None:
    answer = client.chat(MODEL, HELLO, options=SHORT)
    check(answer.message.content and answer.eval_count <= 16, answer)


@feature("stream")
def _() -> None:
    whole = client.chat(MODEL, HELLO, options=SHORT).message.content
    pieces = [
        piece.message.content for piece in client.chat(MODEL, HELLO, options=SHORT, stream=True)
    ]
    check("".join(pieces) == whole, pieces)


@feature("generate")
def _() -> None:
    check(client.generate(MODEL, "One, two,", options=SHORT).response)


@feature("JSON schema")
def _() -> None:
    answer = client.chat(MODEL, ASK, format=WEATHER_SCHEMA, options={"num_predict": 100})
    check(any(city in answer.message.content for city in CITIES), answer)


@feature("tools")
def _() -> None:
    check(client.chat(MODEL, ASK, tools=[WEATHER], options=SHORT).done)


@feature("list, show, ps")
def _() -> None:
    check(client.list().models[0].model == MODEL and client.ps().models)
    check("completion" in client.show(MODEL).capabilities)


@feature("errors")
def _() -> None:
    try:
        client.chat("other", HELLO)
    except ollama.ResponseError as error:
        return check(error.status_code == 404, error)
    check(False, "no error")
