"""langchain-openai: messages, streams, bind_tools, with_structured_output, embeddings."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from report import API_KEY, BASE_URL, CITIES, MODEL, check, feature

model = ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL, temperature=0, max_tokens=300)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


class Weather(BaseModel):
    """The weather."""

    city: str = Field(max_length=30)
    degrees: int


@feature("chat")
def _() -> None:
    answer = model.invoke("Say hello.")
    check(answer.content and answer.usage_metadata["output_tokens"], answer)


@feature("stream")
def _() -> None:
    text = "".join(chunk.content for chunk in model.stream("Say hello."))
    check(text == model.invoke("Say hello.").content, text)


@feature("tools")
def _() -> None:
    bound = model.bind_tools([get_weather], tool_choice="required")
    asked = HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([asked])
    call = answer.tool_calls[0]
    check(call["name"] == "get_weather" and isinstance(call["args"]["city"], str), answer)
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    check(model.bind_tools([get_weather]).invoke([asked, answer, result]))


@feature("tools, streamed")
def _() -> None:
    bound = model.bind_tools([get_weather], tool_choice="get_weather")
    chunks = list(bound.stream("What is the weather in Rome?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    check(isinstance(whole.tool_calls[0]["args"]["city"], str), whole)


@feature("structured output, JSON schema")
def _() -> None:
    bound = model.with_structured_output(Weather, method="json_schema")
    check(isinstance(bound.invoke("The weather in Paris?"), Weather))


@feature("structured output, function calling")
def _() -> None:
    bound = model.with_structured_output(Weather, method="function_calling")
    check(isinstance(bound.invoke("The weather in Paris?"), Weather))


@feature("responses")
def _() -> None:
    given = {"base_url": BASE_URL, "api_key": API_KEY, "model": MODEL, "max_tokens": 100}
    check(ChatOpenAI(**given, use_responses_api=True).invoke("Say hello.").text)


@feature("embeddings")
def _() -> None:
    given = {"base_url": BASE_URL, "api_key": API_KEY, "model": MODEL}
    embeddings = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    check(len(embeddings.embed_documents(["one", "two"])[0]) == 576, CITIES)
