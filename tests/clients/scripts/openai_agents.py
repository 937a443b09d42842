"""openai-agents: a turn in which a tool is called, over chat completions and over responses."""

import agents
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from report import API_KEY, BASE_URL, MODEL, check, feature

agents.set_tracing_disabled(True)
client = AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY)
MODELS = {
    "chat completions": agents.OpenAIChatCompletionsModel(MODEL, client),
    "responses": agents.OpenAIResponsesModel(MODEL, client),
}
called: list[str] = []


class Weather(BaseModel):
    city: str = Field(max_length=30)
    degrees: int


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    called.append(city)
    return f"sunny in {city}"


for name, model in MODELS.items():
    settings = agents.ModelSettings(max_tokens=300, temperature=0)

    @feature(f"agent, {name}")
    def _(model=model, settings=settings) -> None:
        agent = agents.Agent("greeter", "Be brief.", model=model, model_settings=settings)
        check(agents.Runner.run_sync(agent, "Say hello.").final_output)

    @feature(f"tools, {name}")
    def _(model=model) -> None:
        called.clear()
        settings = agents.ModelSettings(max_tokens=300, temperature=0, tool_choice="required")
        agent = agents.Agent(
            "weather",
            "Use the tool.",
            model=model,
            model_settings=settings,
            tools=[get_weather],
            tool_use_behavior="stop_on_first_tool",
        )
        final = agents.Runner.run_sync(agent, "The weather in Paris?", max_turns=3).final_output
        check(called and final.startswith("sunny"), final)

    @feature(f"structured output, {name}")
    def _(model=model, settings=settings) -> None:
        agent = agents.Agent(
            "w", "Answer.", model=model, model_settings=settings, output_type=Weather
        )
        check(isinstance(agents.Runner.run_sync(agent, "Paris?").final_output, Weather))
