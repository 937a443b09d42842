"""Tools in requests: what a client declares, which calls it wants, and the calls and results in its history.

tools, tool_choice, parallel_tool_calls  ->  ToolUse          what the model may, or must, call
messages                                 ->  template's form  arguments as objects, results with their function's name
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from .. import errors, limits
from .fields import Schema

FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class Function(Schema):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    # either way arguments are kept to the schema where a call is asked for
    strict: bool | None = None


class Tool(Schema):
    type: Literal["function"]
    function: Function


class ChosenFunction(Schema):
    name: FunctionName


class Choice(Schema):
    """The one function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Schema):
    mode: Literal["auto", "required"]
    tools: Annotated[list[Choice], Field(min_length=1, max_length=limits.MAX_TOOLS)]


class AllowedChoice(Schema):
    """OpenAI: some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Tools = Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS, fail_fast=True)]
ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[Choice | AllowedChoice, Field(discriminator="type")]
)


class CalledFunction(Schema):
    name: str
    arguments: str


class ToolCall(Schema):
    """A call of the history, as an answer of ours has it."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # left over from a stream

    def for_template(self) -> dict[str, Any]:
        """With the arguments as an object, as templates want them; what is no object stays a text."""
        try:
            arguments = msgspec.json.decode(self.function.arguments or "{}")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id else {})


class ToolUse(msgspec.Struct, frozen=True):
    """What a request lets the model call."""

    tools: list[dict[str, Any]]  # as templates and parsers take them; none: no calls
    required: bool
    named: str | None  # the one that must be called
    parallel: bool


class ToolFields(Schema):
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def tool_use(self) -> ToolUse:
        """ApiError 400 for a choice that the tools do not have."""
        tools = self.tools or []
        choice = self.tool_choice
        required, named = choice == "required", None
        if isinstance(choice, Choice):
            tools = _chosen(tools, [choice])
            required, named = True, choice.function.name
        elif isinstance(choice, AllowedChoice):
            tools = _chosen(tools, choice.allowed_tools.tools)
            required = choice.allowed_tools.mode == "required"
        if required and not tools:
            raise errors.bad_request(
                "'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice"
            )
        if choice == "none":
            tools = []
        return ToolUse(plain_tools(tools), required, named, self.parallel_tool_calls is not False)


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates and parsers take them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _chosen(tools: Sequence[Tool], choices: Sequence[Choice]) -> list[Tool]:
    by_name = {tool.function.name: tool for tool in tools}
    for choice in choices:
        if choice.function.name not in by_name:
            raise errors.bad_request(
                f"'tool_choice' names '{choice.function.name[:64]}', which is not one of the 'tools'.",
                "tool_choice",
            )
    return [by_name[choice.function.name] for choice in choices]
