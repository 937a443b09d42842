"""smolagents: OpenAIServerModel alone, with a stream and with tools."""

from report import API_KEY, ASK, BASE_URL, HELLO, MODEL, check, feature
from smolagents import OpenAIServerModel, Tool

model = OpenAIServerModel(model_id=MODEL, api_base=BASE_URL, api_key=API_KEY, max_tokens=200)


class GetWeather(Tool):
    """The weather in a city."""

    name = "get_weather"
    description = "The weather in a city"
    inputs = {"city": {"type": "string", "description": "A city"}}
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"sunny in {city}"


@feature("chat")
def _() -> None:
    check(model.generate(HELLO).content)


@feature("stream")
def _() -> None:
    check("".join(piece.content or "" for piece in model.generate_stream(HELLO)))


@feature("tools")
def _() -> None:
    answer = model.generate(ASK, tools_to_call_from=[GetWeather()])
    check(answer.tool_calls[0].function.name == "get_weather", answer)


@feature("JSON schema")
def _() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    check(model.generate(ASK, response_format=form).content.startswith("{"))
