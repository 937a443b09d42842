"""The request of POST /v1/responses, and the chat request that it comes to.

instructions, previous response, input     messages, in this order
input_image                                image_url of the message
function_call, function_call_output        tool_calls of the assistant; a tool message
reasoning                                  reasoning_content of the assistant message that follows
text.format                                response_format
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ....engine.sampling_params import MAX_INT
from ... import errors, limits
from ..chat import ChatRequest, ReasoningEffort, chat_request
from ..fields import INTEGRAL, Ignored, OnlyEmptyList, OnlyFalse, OnlyNone, Schema

Json = dict[str, Any]
Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class Part(Schema):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: OnlyEmptyList = None
    logprobs: list[Any] | None = None


class ImagePart(Schema):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None
    file_id: OnlyNone = None


class RefusalPart(Schema):
    type: Literal["refusal"]
    refusal: str


Parts = Annotated[
    list[Annotated[Part | ImagePart | RefusalPart, Field(discriminator="type")]],
    Field(fail_fast=True),
]


class MessageItem(Schema):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: Id | None = None
    status: Status | None = None
    phase: Ignored = None


class CallItem(Schema):
    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: Id | None = None
    status: Status | None = None
    namespace: OnlyNone = None


class CallOutputItem(Schema):
    type: Literal["function_call_output"]
    call_id: Id
    output: str | Parts
    id: Id | None = None
    status: Status | None = None


class ReasoningText(Schema):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Schema):
    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Ignored = None
    status: Status | None = None


_Typed = Annotated[
    MessageItem | CallItem | CallOutputItem | ReasoningItem, Field(discriminator="type")
]
Item = _Typed | MessageItem  # a message may leave out its type
Items = Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]


class FunctionTool(Schema):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None

    def chat(self) -> Json:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


class NamedFunction(Schema):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=256)]

    def chat(self) -> Json:
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(Schema):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=limits.MAX_TOOLS)]

    def chat(self) -> Json:
        tools = [tool.chat() for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}


class PlainFormat(Schema):
    type: Literal["text", "json_object"]


class SchemaFormat(Schema):
    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)]
    json_schema: Annotated[Json | None, Field(alias="schema")] = None
    description: Ignored = None
    strict: bool | None = None


class Text(Schema):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    def response_format(self) -> Json | None:
        given = self.format
        if isinstance(given, SchemaFormat):
            named = {"name": given.name, "schema": given.json_schema, "strict": given.strict}
            return {"type": "json_schema", "json_schema": named}
        return None if given is None else {"type": given.type}


class Reasoning(Schema):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # what was thought is given whole
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Schema):
    include_obfuscation: OnlyFalse = None


class ResponsesRequest(Schema):
    model: Annotated[str, Field(max_length=1024)]
    input: str | Items
    instructions: str | None = None
    previous_response_id: Id | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS), INTEGRAL] | None = None
    tools: (
        Annotated[list[FunctionTool], Field(max_length=limits.MAX_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[Annotated[str, Field(max_length=64)]] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    # Not supported
    conversation: OnlyNone = None
    prompt: OnlyNone = None
    context_management: OnlyEmptyList = None

    @model_validator(mode="after")
    def _one_way(self) -> "ResponsesRequest":
        if self.background and self.stream:
            raise errors.bad_request(
                "'background' and 'stream' exclude each other here.", "background"
            )
        if self.background and self.store is False:
            raise errors.bad_request("'background' needs 'store'.", "background")
        return self

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def input_items(self) -> list[Json]:
        """As they are stored, and given back."""
        if isinstance(self.input, str):
            part = {"type": "input_text", "text": self.input}
            return [{"type": "message", "role": "user", "content": [part]}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def chat(self, before: list[Json]) -> ChatRequest:
        """The chat request that it comes to; `before`: the items of the responses that it goes on from."""
        messages: list[Json] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        messages += chat_messages([*before, *self.input_items()])
        fields: Json = {"model": self.model, "messages": messages, "stream": bool(self.stream)}
        choice = self.tool_choice
        given = {
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [tool.chat() for tool in self.tools or ()] or None,
            "tool_choice": choice.chat()
            if isinstance(choice, NamedFunction | AllowedTools)
            else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text and self.text.response_format(),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "verbosity": self.text and self.text.verbosity,
        }
        if self.top_logprobs or self.wants_logprobs:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        fields |= {name: value for name, value in given.items() if value is not None}
        return chat_request(fields)


def chat_messages(items: Iterable[Json]) -> list[Json]:
    """Items as messages: what the assistant thought, said and called in a row is one message."""
    messages: list[Json] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call_output":
            text = _joined(item["output"])
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _seen(item["content"])})
        else:
            _add(_assistants(messages, kind), item)
    return messages


def _assistants(messages: list[Json], kind: str) -> Json:
    """The assistant's message that an item of a kind goes into: the last, if it may still come there."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
    behind = {
        "reasoning": ("reasoning_content", "content", "tool_calls"),
        "message": ("content", "tool_calls"),
        "function_call": (),
    }
    if not last or any(name in last for name in behind[kind]):
        messages.append({"role": "assistant"})
    return messages[-1]


def _add(message: Json, item: Json) -> None:
    if item.get("type") == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
    elif item.get("type") == "reasoning":
        texts = item.get("content") or item.get("summary") or ()
        message["reasoning_content"] = "\n".join(part["text"] for part in texts)
    else:
        message["content"] = _joined(item["content"])


def _seen(content: str | list[Json]) -> str | list[Json]:
    """What was said, as parts where there are images in it."""
    if isinstance(content, str) or all(part["type"] != "input_image" for part in content):
        return _joined(content)
    return [_part(part) for part in content]


def _part(part: Json) -> Json:
    if part["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": part.get("text") or part.get("refusal") or ""}


def _joined(content: str | list[Json]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or part.get("refusal") or "" for part in content)
