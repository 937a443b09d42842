"""instructor: a pydantic object in its three modes."""

import instructor
import openai
from pydantic import BaseModel, Field
from report import API_KEY, ASK, BASE_URL, MODEL, feature
from report import check as holds


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=30)
    degrees: int = Field(ge=-60, le=60)


def extract(mode: instructor.Mode) -> Weather:
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=API_KEY), mode=mode)
    return client.chat.completions.create(
        model=MODEL, messages=ASK, response_model=Weather, max_retries=1, max_tokens=300
    )


@feature("TOOLS")
def _() -> None:
    holds(isinstance(extract(instructor.Mode.TOOLS), Weather))


@feature("JSON_SCHEMA")
def _() -> None:
    holds(isinstance(extract(instructor.Mode.JSON_SCHEMA), Weather))


@feature("JSON")
def _() -> None:
    """It asks for any JSON object and tells the schema in words: more than JSON a small model does not keep to."""

    class Anything(BaseModel, extra="allow"):
        """Any object."""

    client = instructor.from_openai(
        openai.OpenAI(base_url=BASE_URL, api_key=API_KEY), mode=instructor.Mode.JSON
    )
    one = [{"role": "user", "content": 'Answer {"a": 1} and nothing else.'}]
    asked = {"messages": one, "response_model": Anything, "max_retries": 1, "max_tokens": 400}
    holds(isinstance(client.chat.completions.create(model=MODEL, temperature=0, **asked), Anything))
