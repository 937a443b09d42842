"""What a parser made of an answer, put together again; and that its deltas kept to the rules."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nibble.engine.text.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputFormat,
    OutputParser,
    Parsed,
    Tool,
)
from nibble.tests.engine.text.parsers.corpus import TOOLS


class Said(NamedTuple):
    """An answer. `calls`: name and the text of the arguments."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def output_format(tool: str | None = None, reasoning: str | None = None) -> OutputFormat:
    return OutputFormat(
        TOOL_PARSERS[tool] if tool else None, REASONING_PARSERS[reasoning] if reasoning else None
    )


def said(parser: OutputParser, pieces: Iterable[str]) -> Said:
    """All that a parser says of pieces pushed one after the other."""
    content, reasoning, calls, ids = "", "", [], set()
    for news in _news(parser, pieces):
        content += news.content
        reasoning += news.reasoning
        for delta in news.tool_calls:
            if delta.index == len(calls):  # the first of a call
                assert delta.name and delta.id and delta.id not in ids
                ids.add(delta.id)
                calls.append([delta.name, ""])
            else:
                assert delta.index == len(calls) - 1
                assert delta.name is None and delta.id is None and delta.arguments
            calls[-1][1] += delta.arguments
        assert parser.has_tool_calls == bool(calls)
    return Said(content, reasoning, tuple((name, arguments) for name, arguments in calls))


def _news(parser: OutputParser, pieces: Iterable[str]) -> Iterator[Parsed]:
    for piece in pieces:
        yield parser.push(piece)
    yield parser.finish()


def parse(
    text: str,
    tool: str | None = None,
    reasoning: str | None = None,
    tail: str = "",
    tools: list[Tool] | None = None,
) -> Said:
    """A whole answer, checked to be the same one character at a time."""
    answer_format = output_format(tool, reasoning)
    tools = TOOLS if tools is None else tools
    whole = said(answer_format.parser(tools, tail), [text])
    assert said(answer_format.parser(tools, tail), text) == whole
    return whole


def values(answer: Said) -> list[tuple[str, Any]]:
    """The calls, with their arguments read."""
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]
