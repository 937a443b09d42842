"""Calls in tags, one tag a parameter: Qwen3-Coder's XML and what is written like it.

    <tool_call>                          qwen3_coder, seed_oss      <tool_call>get_weather
    <function=get_weather>                                          <arg_key>city</arg_key>          glm45
    <parameter=city>                                                <arg_value>Paris</arg_value>
    Paris                                                           </tool_call>
    </parameter>
    </function>                          <｜DSML｜function_calls>
    </tool_call>                         <｜DSML｜invoke name="get_weather">                    deepseek_v32
                                         <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>

The values are bare text that only the tool's schema, or an attribute, gives a type: a string is passed on as it comes,
what may be anything else when it is complete. The JSON is made here, in the order of the tags.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .answer import Answer, Tool
from .feed import SPACE, Feed, Sink, Steps, marks
from .formats import calls_of
from .grammar import (
    Lark,
    Parameter,
    arguments_schema,
    bare_strings,
    one_of,
    parameters_of,
    repeated,
)
from .json_text import rest_of_string
from .literals import python_json
from .typed import escaped, is_text, property_schema, to_json, types_of, value_json

_NAME = re.compile(r"[\w.\-:/]*")


class Tags(msgspec.Struct, frozen=True):
    """How the tags of a family read. White space may stand between any two of them."""

    block: str  # opens a block of calls
    block_end: str
    call: str  # opens a call, before its name; "": the block is the call
    name_end: str
    call_end: str
    parameter: str  # opens a parameter, before its name
    # what stands between name and value -> whether the value is a string; None: the schema says
    key_ends: Mapping[str, bool | None]
    value_end: str
    value: str = ""  # opens a value, if more than the end of its name does
    newline: str = "\n"  # between two tags, as the family writes them
    is_padded: bool = False  # a newline before and one after a value are no part of it
    is_single: bool = True  # a block holds one call


QWEN = Tags(
    "<tool_call>", "</tool_call>", "<function=", ">", "</function>", "<parameter=", {">": None},
    "</parameter>", is_padded=True,
)  # fmt: skip
SEED = msgspec.structs.replace(
    QWEN, block="<seed:tool_call>", block_end="</seed:tool_call>", is_padded=False
)
MINIMAX = Tags(
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', '">', "</invoke>",
    '<parameter name="', {'">': None}, "</parameter>", is_single=False,
)  # fmt: skip
GLM45 = Tags(
    "<tool_call>", "</tool_call>", "", "", "", "<arg_key>", {"</arg_key>": None}, "</arg_value>",
    value="<arg_value>",
)  # fmt: skip
GLM47 = msgspec.structs.replace(GLM45, newline="")


def _dsml(block: str) -> Tags:
    return Tags(
        f"<｜DSML｜{block}>", f"</｜DSML｜{block}>", '<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>",
        '<｜DSML｜parameter name="', {'" string="true">': True, '" string="false">': False},
        "</｜DSML｜parameter>", is_single=False,
    )  # fmt: skip


DEEPSEEK_V32 = _dsml("function_calls")
DEEPSEEK_V4 = _dsml("tool_calls")


def tag_calls(answer: Answer, mark: str, tags: Tags) -> Steps[bool]:
    """All calls of a block, after its opening tag; or after that of a call, where a model has left out the block's."""
    feed = answer.feed
    if mark == tags.block:
        yield from feed.run(SPACE)
        if tags.call and not (yield from feed.match(tags.call)):
            return False
    if not (yield from _tag_call(answer, tags)):
        return False
    while True:
        space: list[str] = []
        yield from feed.run(SPACE, space.append)
        found = yield from feed.match(tags.block_end, *filter(None, [tags.call]))
        if found != tags.call or not found:
            if not found:
                answer.content.write("".join(space))
            return True
        if not (yield from answer.attempt(_tag_call(answer, tags), found, answer.content)):
            return True


def _tag_call(answer: Answer, tags: Tags) -> Steps[bool]:
    """One call, after what stands before its name. It has begun when a parameter or its end has come."""
    feed, write = answer.feed, answer.calls.write
    name = yield from feed.word(_NAME)
    if not name or (tags.name_end and not (yield from feed.match(tags.name_end))):
        return False
    ends = (tags.call_end, tags.block_end) if tags.call else (tags.block_end,)
    yield from feed.run(SPACE)
    found = yield from feed.match(tags.parameter, *ends)
    if not found:
        return False
    answer.begin_call(name)
    schema = answer.parameters(name)
    write("{")
    between = ""
    while found == tags.parameter:
        write(between)
        if not (yield from _parameter(answer, tags, schema)):
            return True
        between = ", "
        yield from feed.run(SPACE)
        found = yield from feed.match(tags.parameter, *ends)
    if found:
        write("}")
    return True


def _parameter(answer: Answer, tags: Tags, schema: Mapping[str, Any] | None) -> Steps[bool]:
    """One parameter, after what stands before its name; whether it is complete."""
    feed, write = answer.feed, answer.calls.write
    pieces: list[str] = []

    def name_piece(text: str) -> None:
        pieces.append(text)
        write(escaped(text))

    write('"')
    key_end = yield from feed.upto(marks(*tags.key_ends), name_piece)
    if not key_end:
        return False
    write('": ')
    if tags.value:
        yield from feed.run(SPACE)
        if not (yield from feed.match(tags.value)):
            return False
    if tags.is_padded:
        yield from feed.match("\n")
    is_string = tags.key_ends[key_end]
    if is_string is not None:
        return (yield from _value(answer, tags, {}, is_string))
    value_schema = property_schema(schema, "".join(pieces).strip())
    return (yield from _value(answer, tags, value_schema, is_text(value_schema)))


def _value(answer: Answer, tags: Tags, schema: Mapping[str, Any], is_string: bool) -> Steps[bool]:
    feed, write = answer.feed, answer.calls.write
    ends = [f"\n{tags.value_end}"] * tags.is_padded + [tags.value_end]
    if is_string:
        write('"')
        end = yield from feed.upto(marks(*ends), lambda text: write(escaped(text)))
        write('"' if end else "")
        return bool(end)
    pieces: list[str] = []
    end = yield from _upto_end(feed, ends, pieces.append)
    text = "".join(pieces)
    write(_json_of(text, schema) if end else text)
    return bool(end)


def _upto_end(feed: Feed, ends: list[str], sink: Sink) -> Steps[str]:
    """All of a value that is no string. If it is JSON, a mark in one of its strings does not end it."""
    is_json = (yield from feed.peek()) in ("{", "[", '"')
    wanted = marks(*ends, '"') if is_json else marks(*ends)
    while (end := (yield from feed.upto(wanted, sink))) == '"':
        sink(end)
        yield from rest_of_string(feed, sink)
    return end


def _json_of(text: str, schema: Mapping[str, Any]) -> str:
    """A value that is no string by its schema. Seed-OSS's template writes objects as Python does."""
    found = value_json(text, schema)
    if found is None and types_of(schema) & {"object", "array"}:
        found = python_json(text)
    return to_json(text) if found is None else found


def tag_rules(lark: Lark, tools: Sequence[Tool], parallel: bool, tags: Tags) -> str:
    """A block of calls, or blocks of one each where a family writes it so."""
    call = calls_of(lark, tools, lambda lark, tool: _call_rule(lark, tool, tags))
    opening = lark.text(tags.block + (tags.newline if tags.call else ""))
    closing = lark.text(tags.block_end)
    if tags.is_single:
        return repeated(lark.rule(f"{opening} {call} {closing}"), '"\\n"?', parallel)
    return f"{opening} {repeated(call, '', parallel)} {closing}"


def _call_rule(lark: Lark, tool: Tool, tags: Tags) -> str:
    what = f"tool {tool.name!r}"
    parameters = [
        _parameter_rule(lark, parameter, tags, f"{what}, parameter {parameter.name!r}")
        for parameter in parameters_of(arguments_schema(tool), what)
    ]
    head = lark.text(f"{tags.call}{tool.name}{tags.name_end}{tags.newline}")
    tail = lark.text(tags.call_end + tags.newline) if tags.call else ""
    return " ".join(filter(None, [head, *parameters, tail]))


def _parameter_rule(lark: Lark, parameter: Parameter, tags: Tags, what: str) -> str:
    padding = "\n" if tags.is_padded else ""
    is_string = is_text(parameter.schema)
    key_end = next(end for end, string in tags.key_ends.items() if string in (None, is_string))
    value_start = f"{tags.newline}{tags.value}" if tags.value else ""
    head = lark.text(f"{tags.parameter}{parameter.name}{key_end}{value_start}{padding}")
    if is_string:
        terminals = bare_strings(parameter.schema, parameter.schema, what)
        value = one_of(lark.upto(tags.value_end, each, padding) for each in terminals)
    else:
        value = f"{lark.json(parameter.schema)} {lark.text(padding + tags.value_end)}"
    item = lark.rule(f"{head} {value} {lark.text(tags.newline)}".strip())
    return item if parameter.required else f"{item}?"
