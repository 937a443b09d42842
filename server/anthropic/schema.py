"""The request of POST /v1/messages, and the chat request that it comes to.

system                      a system message
user's tool_result          a tool message each, before what else the user says
user's image                image_url of the message
assistant's tool_use        tool_calls; thinking: reasoning_content
tools, tool_choice          function tools; any: required
thinking                    the template's enable_thinking
cache_control, signatures   taken, and of no meaning here: prefixes are cached by themselves
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine.sampling_params import MAX_INT
from .. import errors, limits
from ..openai.chat import ChatRequest, chat_request
from ..openai.fields import INTEGRAL, Ignored, OnlyEmptyList, OnlyNone, Schema, StopString

Anything = dict[str, Any]


class CacheControl(Schema):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Schema):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: OnlyEmptyList = None


class ImageSource(Schema):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class ImageBlock(Block):
    type: Literal["image"]
    source: ImageSource


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: Anything
    caller: Anything | None = None


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=256)]
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class Message(Schema):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[ContentBlock], Field(fail_fast=True)]


class Tool(Block):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: Anything
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    display: Ignored = None


class Metadata(Schema):
    user_id: Ignored = None


class OutputFormat(Schema):
    type: Literal["json_schema"]
    json_schema: Annotated[Anything, Field(alias="schema")]


class OutputConfig(Schema):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Schema):
    """Of /v1/messages/count_tokens: what the prompt is made of."""

    model: Annotated[str, Field(max_length=1024)]
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)
    ]
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None

    def chat_fields(self) -> Anything:
        """The fields of the ChatRequest that comes to the same prompt."""
        system = _text(self.system)
        messages: list[Anything] = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += _messages(message)
        fields: Anything = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            fields |= _choice(self.tool_choice)
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            fields["chat_template_kwargs"] = {"enable_thinking": thinks}
        config = self.output_config
        if config is not None and config.format is not None:
            fields["json_schema"] = config.format.json_schema
        return fields


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL]
    stop_sequences: (
        Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS)] | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: Ignored = None
    # Not supported
    container: OnlyNone = None
    mcp_servers: OnlyEmptyList = None
    context_management: OnlyNone = None

    def chat(self) -> ChatRequest:
        """The chat request that it comes to. ApiError 400 if that is none."""
        fields = self.chat_fields() | {"max_tokens": self.max_tokens, "stream": bool(self.stream)}
        same = {
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p or None,  # 0, which is allowed here: as good as none
            "top_k": self.top_k,
        }
        fields |= {name: value for name, value in same.items() if value is not None}
        return chat_request(fields)


def _messages(message: Message) -> list[Anything]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [_result(b) for b in message.content if isinstance(b, ToolResultBlock)]
    calls = [_call(b) for b in message.content if isinstance(b, ToolUseBlock)]
    if results and message.role != "user":
        raise errors.bad_request("messages: only the user has 'tool_result' blocks.", "messages")
    if calls and message.role != "assistant":
        raise errors.bad_request("messages: only the assistant has 'tool_use' blocks.", "messages")
    text = _said(message.content)
    thinking = "\n".join(b.thinking for b in message.content if isinstance(b, ThinkingBlock))
    if results and not text:
        return results
    said: Anything = {"role": message.role, "content": text}
    if calls:
        said["tool_calls"] = calls
    if thinking:
        said["reasoning_content"] = thinking
    return [*results, said]


def _said(blocks: list[ContentBlock]) -> str | list[Anything]:
    """Texts and images of a message, as parts where there are images."""
    parts = [part for block in blocks if (part := _part(block)) is not None]
    if any(part["type"] == "image_url" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(block: ContentBlock) -> Anything | None:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, ImageBlock):
        source = block.source
        url = f"data:{source.media_type};base64,{source.data}"
        return {"type": "image_url", "image_url": {"url": url}}
    return None


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(b.text for b in content or ())


def _result(block: ToolResultBlock) -> Anything:
    content = _text(block.content)
    text = f"Error: {content}" if block.is_error else content
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _call(block: ToolUseBlock) -> Anything:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _tool(tool: Tool) -> Anything:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Anything:
    named = {"type": "function", "function": {"name": choice.name or ""}}
    chosen = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    fields: Anything = {"tool_choice": chosen}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields
