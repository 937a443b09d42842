"""Calls in which a name and the JSON of its arguments stand between control tokens.

    Mistral        [TOOL_CALLS][{"name": "f", "arguments": {"city": "Paris"}}]
        from v11   [TOOL_CALLS]f[ARGS]{"city": "Paris"}
    DeepSeek V3    <｜tool▁call▁begin｜>function<｜tool▁sep｜>f⏎```json⏎{"city": "Paris"}⏎```<｜tool▁call▁end｜>
        V3.1       <｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>
    Kimi K2        <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>

Mistral begins every call with its mark; around the calls of the others stand marks for all of them.
"""

import re
import secrets
import string
from collections.abc import Sequence

import msgspec

from .answer import Answer, Tool
from .feed import SPACE, Steps
from .formats import calls_of
from .grammar import Lark, arguments_schema, json_call, repeated
from .json_text import json_arguments, json_calls

_NAME = re.compile(r"[\w.\-:]*")
MISTRAL, MISTRAL_ARGUMENTS, MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ALPHANUMERIC = string.ascii_letters + string.digits


class Sections(msgspec.Struct, frozen=True):
    """How the sections of a family are marked."""

    block: str
    block_end: str
    call: str
    arguments: str
    call_end: str


DEEPSEEK = Sections(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
)  # fmt: skip
KIMI = Sections(
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
DEEPSEEK_KIND, FENCE, FENCE_END = "function", "```json", "```"


def section_calls(answer: Answer, mark: str, sections: Sections) -> Steps[bool]:
    """All calls of a block, after its opening mark; or after that of a call, where a model has left out the block's."""
    feed = answer.feed
    if mark == sections.block:
        yield from feed.run(SPACE)
        if not (yield from feed.match(sections.call)):
            return False
    if not (yield from _section_call(answer, sections)):
        return False
    while True:
        space: list[str] = []
        yield from feed.run(SPACE, space.append)
        found = yield from feed.match(sections.call, sections.block_end)
        if found != sections.call:
            if not found:
                answer.content.write("".join(space))
            return True
        if not (yield from answer.attempt(_section_call(answer, sections), found, answer.content)):
            return True


def _section_call(answer: Answer, sections: Sections) -> Steps[bool]:
    feed = answer.feed
    yield from feed.run(SPACE)
    name = yield from feed.word(_NAME)
    yield from feed.run(SPACE)
    if not name or not (yield from feed.match(sections.arguments)):
        return False
    if sections is DEEPSEEK and name == DEEPSEEK_KIND and (yield from feed.peek()) not in ("", "{"):
        name = yield from feed.word(_NAME)
        yield from feed.run(SPACE)
        yield from feed.match(FENCE, FENCE_END)
    if sections is KIMI:
        name = name.removeprefix("functions.").rpartition(":")[0] or name
    yield from feed.run(SPACE)
    if not name or not (yield from feed.peek()):
        return False
    answer.begin_call(name)
    yield from json_arguments(feed, answer.calls.write)
    yield from feed.run(SPACE)
    yield from feed.match(FENCE_END)
    yield from feed.run(SPACE)
    yield from feed.match(sections.call_end)
    return True


def mistral_calls(answer: Answer, mark: str) -> Steps[bool]:
    """What comes after one [TOOL_CALLS]: an array of calls, or a name and its arguments."""
    feed = answer.feed
    yield from feed.run(SPACE)
    if (yield from feed.peek()) in ("[", "{"):
        return (yield from json_calls(answer))
    name = yield from feed.word(_NAME)
    if (yield from feed.match(MISTRAL_ID)):  # ids are made here
        yield from feed.word(_NAME)
    yield from feed.match(MISTRAL_ARGUMENTS)
    yield from feed.run(SPACE)
    if not name or (yield from feed.peek()) not in ("{", '"'):
        return False
    answer.begin_call(name)
    yield from json_arguments(feed, answer.calls.write)
    return True


def mistral_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse any other."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def section_rules(
    lark: Lark, tools: Sequence[Tool], parallel: bool, sections: Sections, fenced: bool = False
) -> str:
    """A block of calls; DeepSeek V3 fences their arguments."""
    before, after = (f"\n{FENCE}\n", f"\n{FENCE_END}") if fenced else ("", "")

    def rule(lark: Lark, tool: Tool) -> str:
        if sections is KIMI:  # which counts its calls
            head = lark.text(f"{sections.call}functions.{tool.name}:")
            name = f"{head} /[0-9]{{1,3}}/ {lark.text(sections.arguments)}"
        elif fenced:
            name = lark.text(f"{sections.call}{DEEPSEEK_KIND}{sections.arguments}{tool.name}")
        else:
            name = lark.text(f"{sections.call}{tool.name}{sections.arguments}")
        arguments = lark.json(arguments_schema(tool))
        return " ".join(
            filter(None, [name, lark.text(before), arguments, lark.text(after + sections.call_end)])
        )

    calls = repeated(calls_of(lark, tools, rule), '"\\n"?', parallel)
    return f"{lark.text(sections.block)} {calls} {lark.text(sections.block_end)}"


def mistral_rules(lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
    """Which of its two syntaxes a model writes, its tokens tell: the newer one has a token before the arguments."""
    if lark.has_token(MISTRAL_ARGUMENTS):

        def rule(lark: Lark, tool: Tool) -> str:
            head = lark.text(f"{MISTRAL}{tool.name}{MISTRAL_ARGUMENTS}")
            return f"{head} {lark.json(arguments_schema(tool))}"

        return repeated(calls_of(lark, tools, rule), "", parallel)
    calls = repeated(calls_of(lark, tools, json_call), '", "', parallel)
    return f"{lark.text(MISTRAL + '[')} {calls} {lark.text(']')}"
