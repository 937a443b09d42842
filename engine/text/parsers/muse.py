"""Muse Glimmer's format: messages with a recipient each, and calls in tags.

    <|start|>assistant | to=self<|message|>The user wants ...<|eom|>                           reasoning
    <|start|>assistant to=user<|message|>Let me look.<|eom|>                                   content
    <|start|>assistant to=f<|message|><atem:function_calls>⏎<atem:invoke name="f">⏎...<|eot|>  calls

The prompt ends in `<|start|>assistant`. Tags in a thought, or in a message for the user, call nothing: they are text.
"""

import re
from collections.abc import Sequence

from .answer import Answer, Tool
from .feed import SPACE, Steps, marks
from .formats import calls_of
from .grammar import Lark, repeated, without
from .tags import Tags, tag_calls, tag_rules

START, MESSAGE, ENDS = "<|start|>", "<|message|>", ("<|eom|>", "<|eot|>")
MUSE_KEPT = (START, MESSAGE, *ENDS)
ATEM = Tags(
    "<atem:function_calls>", "</atem:function_calls>", '<atem:invoke name="', '">', "</atem:invoke>",
    '<atem:parameter name="', {'">': None}, "</atem:parameter>", is_single=False,
)  # fmt: skip
_RECIPIENT = re.compile(r"[\w.\-]*")
_TO = "to="
_BODY_ENDS = marks(START, *ENDS)


def read_muse(answer: Answer, prompt_tail: str) -> Steps[None]:
    """All of an answer."""
    feed = answer.feed
    header, message, _ = prompt_tail.rpartition(START)[2].partition(MESSAGE)
    end = (yield from _read_body(answer, header.rpartition(_TO)[2])) if message else START
    while end:
        space: list[str] = []
        yield from feed.run(SPACE, space.append)
        found = yield from feed.match(_TO, MESSAGE, START)
        if found == START:
            yield from feed.match("assistant")
        elif found == MESSAGE:
            end = yield from _read_body(answer, "user")
        elif found:
            recipient = yield from feed.word(_RECIPIENT)
            if (yield from feed.match(MESSAGE)):
                end = yield from _read_body(answer, recipient)
            else:
                answer.content.write("".join([*space, _TO, recipient]))
        else:  # without a header it is an answer
            answer.content.write("".join(space))
            end = yield from feed.upto(_BODY_ENDS, answer.content.write)
            if end == START:
                yield from feed.match("assistant")


def _read_body(answer: Answer, recipient: str) -> Steps[str]:
    """One message's text, or calls; the mark that ends it."""
    feed = answer.feed
    writer = answer.reasoning if recipient == "self" else answer.content
    writer.mark(between="\n")
    if recipient not in ("self", "user"):
        yield from feed.run(SPACE)
        if (yield from feed.match(ATEM.block)):
            calls = tag_calls(answer, ATEM.block, ATEM)
            yield from answer.attempt(calls, ATEM.block, answer.content)
    end = yield from feed.upto(_BODY_ENDS, writer.write)
    if end:
        writer.mark()
    if end == START:
        yield from feed.match("assistant")
    return end


def _thoughts(lark: Lark) -> str:
    thought, again = lark.text(f" {_TO}self{MESSAGE}"), lark.text(f"{START}assistant")
    return f"({thought} {lark.upto(ENDS[0], without(*MUSE_KEPT))} {again})*"


def muse_before_content(lark: Lark) -> str:
    """Reasoning, and the header of the message for the user."""
    return f"{_thoughts(lark)} {lark.text(f' {_TO}user{MESSAGE}')}"


def muse_rules(lark: Lark, tools: Sequence[Tool], parallel: bool) -> str:
    """Reasoning, then calls, each a message of its own."""
    again = lark.text(f"{ENDS[0]}{START}assistant")

    def rule(lark: Lark, tool: Tool) -> str:
        return f"{lark.text(f' {_TO}{tool.name}{MESSAGE}')} {tag_rules(lark, [tool], False, ATEM)}"

    return f"{_thoughts(lark)} {repeated(calls_of(lark, tools, rule), again, parallel)}"
