"""pydantic-ai: agents with text, native and tool output, and with a tool."""

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits
from report import API_KEY, BASE_URL, MODEL, check, feature

provider = OpenAIProvider(base_url=BASE_URL, api_key=API_KEY)
model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = {"max_tokens": 300, "temperature": 0}


class Weather(BaseModel):
    city: str = Field(max_length=30)
    degrees: int


@feature("chat")
def _() -> None:
    check(Agent(model, model_settings=SETTINGS).run_sync("Say hello.").output)


@feature("native output")
def _() -> None:
    agent = Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS)
    check(isinstance(agent.run_sync("The weather in Paris?").output, Weather))


@feature("tool output")
def _() -> None:
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS)
    check(isinstance(agent.run_sync("The weather in Paris?").output, Weather))


@feature("tools")
def _() -> None:
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS)
    called = []

    @agent.tool_plain
    def get_degrees(city: str) -> int:
        """The temperature in a city."""
        called.append(city)
        return 20

    agent.run_sync("How warm is Paris?", usage_limits=UsageLimits(request_limit=6))
    check(isinstance(called, list))


@feature("Responses API")
def _() -> None:
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings=SETTINGS)
    check(agent.run_sync("Say hello.").output)
