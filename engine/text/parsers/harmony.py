"""Harmony, GPT-OSS's format: an answer is messages, each with a header that says where it goes.

    <|start|>assistant | <|channel|>analysis<|message|>The user wants ...<|end|>             reasoning
    <|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>                    content
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>    call
    <|start|>assistant<|channel|>final<|message|>Sunny.<|return|>                            content

The prompt ends in `<|start|>assistant`, or later, so the answer may begin within a header or within a message. The
recipient may stand before the channel too. The engine takes the last mark away with the end of the generation.
"""

import re
from collections.abc import Sequence

from .answer import Answer, Tool
from .feed import SPACE, Steps, marks
from .formats import calls_of
from .grammar import Lark, arguments_schema, without
from .json_text import json_arguments

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
KEPT = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
REASONING = "analysis"
_BROKEN_OFF = re.compile(
    r"\s*(?:assistant)?\s*<\|channel\|>\s*\w{0,10}\s*"
)  # a header with nothing to say yet
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w*)")
_NOBODY = ("assistant", "user", "all")
_BODY_ENDS = marks(*ENDS, START, CHANNEL)
_HEADER_ENDS = marks(MESSAGE, *ENDS)
_STARTS = (START, CHANNEL, "to=")


def read_harmony(answer: Answer, prompt_tail: str) -> Steps[None]:
    """All of an answer."""
    feed = answer.feed
    header = prompt_tail.rpartition(START)[2] if START in prompt_tail else ""
    header, message, said = header.partition(MESSAGE)
    if message and not any(end in said for end in ENDS):
        mark = yield from _read_body(answer, header)
    elif CHANNEL in header or "to=" in header:
        mark = yield from _read_message(answer, header)
    else:
        mark = yield from _read_start(answer)
    while mark:
        if mark in ENDS:
            space: list[str] = []
            yield from feed.run(SPACE, space.append)
            mark = yield from feed.match(START, CHANNEL)
            if not mark:  # no message: text
                answer.content.write("".join(space))
                mark = yield from feed.upto(_BODY_ENDS, answer.content.write)
        elif mark == START:
            mark = yield from _read_message(answer, "")
        else:
            mark = yield from _read_message(answer, mark)


def _read_start(answer: Answer) -> Steps[str]:
    """The beginning of an answer, which goes on after `<|start|>assistant`; the mark that ends its message."""
    space: list[str] = []
    yield from answer.feed.run(SPACE, space.append)
    found = yield from answer.feed.match(*_STARTS)
    if found:
        return (yield from _read_message(answer, "".join(space) + found.removeprefix(START)))
    answer.content.write("".join(space))  # without a header it is an answer
    return (yield from answer.feed.upto(_BODY_ENDS, answer.content.write))


def _read_message(answer: Answer, header: str) -> Steps[str]:
    """One message, whose header goes on after the part that is given; the mark that ends it."""
    pieces = [header]
    end = yield from answer.feed.upto(_HEADER_ENDS, pieces.append)
    header = "".join(pieces)
    if end == MESSAGE:
        return (yield from _read_body(answer, header))
    if not _BROKEN_OFF.fullmatch(header):
        answer.content.write(header)  # no header, or one of a call that never begins
    return end


def _read_body(answer: Answer, header: str) -> Steps[str]:
    feed = answer.feed
    name = _recipient(header)
    if name:
        return (yield from _read_call(answer, name))
    channel = _CHANNEL.search(header)
    writer = answer.reasoning if channel and channel[1] == REASONING else answer.content
    writer.mark(between="\n")
    end = yield from feed.upto(_BODY_ENDS, writer.write)
    if end:
        writer.mark()
    return end


def _read_call(answer: Answer, name: str) -> Steps[str]:
    """The arguments: they are JSON, in whose strings a mark is none, and they are passed on as they stand."""
    feed, write = answer.feed, answer.calls.write
    answer.begin_call(name.removeprefix("functions."))
    yield from feed.run(SPACE)
    if (yield from feed.peek()) in ("{", '"'):
        yield from json_arguments(feed, write)
        yield from feed.run(SPACE)
        return (yield from feed.upto(_BODY_ENDS, answer.content.write))
    return (yield from feed.upto(_BODY_ENDS, write))


def _recipient(header: str) -> str | None:
    found = _RECIPIENT.search(header)
    return found[1] if found and found[1] not in _NOBODY else None


def _thoughts(lark: Lark) -> str:
    thought = lark.text(f"{CHANNEL}{REASONING}{MESSAGE}")
    text = lark.upto("<|end|>", without(*KEPT))
    return f"({thought} {text} {lark.text(START + 'assistant')})*"


def harmony_before_content(lark: Lark) -> str:
    """Reasoning, and the header of the message for the user."""
    return f"{_thoughts(lark)} {lark.text(f'{CHANNEL}final')} ({lark.text(f' {CONSTRAIN}json')})? {lark.text(MESSAGE)}"


def harmony_rules(lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
    """Reasoning, then one call: its last mark ends the answer."""

    def rule(lark: Lark, tool: Tool) -> str:
        head = f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}"
        return f"{lark.text(head)} {lark.json(arguments_schema(tool))}"

    return f"{_thoughts(lark)} {calls_of(lark, tools, rule)}"
