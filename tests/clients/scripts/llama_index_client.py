"""llama-index: OpenAILike and OpenAILikeEmbedding."""

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from report import API_KEY, BASE_URL, MODEL, check, feature

GIVEN = {"api_base": BASE_URL, "api_key": API_KEY}
CHAT = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 8192}
llm = OpenAILike(model=MODEL, **GIVEN, **CHAT, max_tokens=100, temperature=0)
HELLO = [ChatMessage(role="user", content="Say hello.")]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@feature("chat")
def _() -> None:
    check(llm.chat(HELLO).message.content)


@feature("stream")
def _() -> None:
    check("".join(piece.delta or "" for piece in llm.stream_chat(HELLO)))


@feature("completions")
def _() -> None:
    plain = OpenAILike(model=MODEL, **GIVEN, is_chat_model=False, max_tokens=8)
    check(plain.complete("One, two,").text)


@feature("tools")
def _() -> None:
    tool = FunctionTool.from_defaults(get_weather)
    answer = llm.chat_with_tools([tool], user_msg="Weather in Paris?", tool_required=True)
    (call, *_) = llm.get_tool_calls_from_response(answer)
    check(call.tool_name == "get_weather" and isinstance(call.tool_kwargs["city"], str), call)


@feature("embeddings")
def _() -> None:
    embedding = OpenAILikeEmbedding(model_name=MODEL, **GIVEN)
    check(len(embedding.get_text_embedding("one")) == 576)
