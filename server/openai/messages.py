"""The messages of a conversation, as clients send them and as chat templates take them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from .. import errors, limits
from .fields import CONTENT_PART, Ignored, OnlyEmptyList, OnlyNone, Schema, excludes
from .tools import ToolCall


class ImageUrl(Schema):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # a hint: models have a size of their own


# JSON schema of the two kinds of parts; a model that does not see takes the first alone (openapi.describe)
TEXT_PART: dict[str, Any] = {
    "properties": {"type": {"const": "text"}, "image_url": {"type": "null"}}
}
IMAGE_PART: dict[str, Any] = {
    "properties": {"type": {"const": "image_url"}, "image_url": {"type": "object"}},
    "required": ["image_url"],
}


class ContentPart(Schema):
    model_config = ConfigDict(
        validate_default=True,
        json_schema_extra={CONTENT_PART: True, "anyOf": [TEXT_PART, IMAGE_PART]},
    )

    type: Annotated[str, Field(json_schema_extra={"enum": ["text", "image_url"]})]
    text: str | None = None
    image_url: ImageUrl | None = None
    # Named so that the refusal of a part we cannot read says what kind it was, not that this field is unknown.
    input_audio: OnlyNone = None
    video_url: OnlyNone = None
    file: OnlyNone = None
    refusal: OnlyNone = None

    @field_validator("type")
    @classmethod
    def _known(cls, type: str) -> str:
        if type not in ("text", "image_url"):
            raise ValueError(
                f"content part type '{type[:64]}' is not supported, only 'text' and 'image_url' are"
            )
        return type

    @field_validator("image_url")
    @classmethod
    def _of_its_type(cls, image_url: ImageUrl | None, info: ValidationInfo) -> ImageUrl | None:
        if (image_url is not None) != (info.data.get("type") == "image_url"):
            raise ValueError("a part of type 'image_url', and no other, has an 'image_url'")
        return image_url

    def for_template(self) -> dict[str, str]:
        if self.image_url is not None:
            return {"type": "image"}
        return {"type": "text", "text": self.text or ""}


class Message(Schema):
    model_config = ConfigDict(
        json_schema_extra=excludes(
            "tool_calls",
            unless={"role": "assistant"},
            anyOf=[{"type": "null"}, {"type": "array", "maxItems": 0}],
        )
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: Ignored = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    # What a client sends back when it repeats an answer of ours.
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOL_CALLS)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under OpenAI's name
    refusal: OnlyNone = None
    audio: OnlyNone = None
    function_call: OnlyNone = None
    annotations: OnlyEmptyList = None

    @property
    def parts(self) -> list[ContentPart]:
        return self.content if isinstance(self.content, list) else []

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text or "" for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """`developer` is OpenAI's newer name for what every template calls `system`. Content is text, or parts where
        there are images among it."""
        sees = any(part.image_url is not None for part in self.parts)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": [part.for_template() for part in self.parts] if sees else self.text,
        }
        reasoning = self.reasoning_content or self.reasoning
        given = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": reasoning,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()],
        }
        return message | {name: value for name, value in given.items() if value}


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)
]


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Plain messages, each result with the name of the function that gave it. ApiError 400 for calls that are not the
    assistant's."""
    names: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        plain = message.for_template()
        if message.tool_calls and message.role != "assistant":
            raise errors.bad_request(
                f"messages[{index}]: only the assistant has 'tool_calls'.", "messages"
            )
        if message.role != "user" and isinstance(plain["content"], list):
            raise errors.bad_request(f"messages[{index}]: only the user has images.", "messages")
        names |= {call.id: call.function.name for call in message.tool_calls or () if call.id}
        if message.role == "tool" and message.tool_call_id is not None:
            plain.setdefault("name", names.get(message.tool_call_id, ""))
        found.append(plain)
    return found
