"""Formats whose calls are JSON objects, with marks around them or none.

    <tool_call>⏎{"name": "f", "arguments": {}}⏎</tool_call>             hermes, one call a block
    <TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>               nemotron_json, granite, phi4_mini_json: a list
    {"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}    llama3_json, from the beginning of the answer

Where there are no marks, an object is a call only if it has a name, arguments and nothing that calls have not.
"""

from collections.abc import Sequence
from functools import partial

from .answer import Answer, Tool
from .feed import SPACE, Steps
from .formats import ToolFormat, calls_of
from .grammar import Lark, json_call, repeated
from .json_text import json_call as read_json_call
from .json_text import json_calls, more_json_calls

_PYTHON_TAG = "<|python_tag|>"


def _between_marks(answer: Answer, mark: str, closing: tuple[str, ...]) -> Steps[bool]:
    return (yield from json_calls(answer, close=closing))


def _without_marks(answer: Answer, mark: str) -> Steps[bool]:
    """Calls where the answer begins, or after Llama's mark for code."""
    if mark != "{":
        yield from answer.feed.run(SPACE)
        mark = yield from answer.feed.match("{")
    if not mark or not (yield from read_json_call(answer, strict=True)):
        return False
    return (yield from more_json_calls(answer, strict=True))


def _listed(
    lark: Lark, tools: Sequence[Tool], parallel: bool, opening: str, closing: str, key: str = "arguments",
    between: str = ", ",
) -> str:  # fmt: skip
    """Calls in a row between two marks."""
    call = calls_of(lark, tools, partial(json_call, key=key))
    parts = [lark.text(opening), repeated(call, lark.text(between), parallel), lark.text(closing)]
    return " ".join(filter(None, parts))


def _in_blocks(lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
    """Each call between marks of its own."""
    call = calls_of(lark, tools, json_call)
    block = lark.rule(f"{lark.text(_OPEN + chr(10))} {call} {lark.text(chr(10) + _CLOSE)}")
    return repeated(block, lark.text("\n"), parallel)


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def _list_format(name: str, *marks: tuple[str, str]) -> ToolFormat:
    """A list between marks; of several pairs of marks the first is what a grammar asks for."""
    opening, closing = marks[0]
    return ToolFormat(
        name,
        partial(_between_marks, closing=tuple(end for _, end in marks if end)),
        partial(_listed, opening=opening + "[", closing="]" + closing),
        marks=tuple(start for start, _ in marks),
        inner_marks=tuple(end for _, end in marks if end),
    )


JSON_FORMATS = (
    ToolFormat(
        "hermes",
        partial(_between_marks, closing=(_CLOSE,)),
        _in_blocks,
        marks=(_OPEN,),
        inner_marks=(_CLOSE,),
    ),
    _list_format("granite", ("<|tool_call|>", ""), (_OPEN, _CLOSE)),
    _list_format("phi4_mini_json", ("<|tool_call|>", "<|/tool_call|>"), ("functools", "")),
    _list_format("nemotron_json", ("<TOOLCALL>", "</TOOLCALL>")),
    _list_format("apriel", ("<tool_calls>", "</tool_calls>")),
    ToolFormat(
        "llama3_json",
        _without_marks,
        partial(_listed, opening="", closing="", key="parameters", between="; "),
        marks=(_PYTHON_TAG,),
        starts=("{",),
    ),
    ToolFormat(
        "json",
        _without_marks,
        partial(_listed, opening="[", closing="]"),
        starts=("{", "["),
    ),
)
