"""Answers whose text holds more than content: a parser for each sequence tells calls and reasoning from it.

text  ->  OutputParser  ->  content | reasoning | calls  ->  what each API makes of them
"""

from collections.abc import Callable
from collections.abc import Sequence as Items

from ...engine.text.parsers import OutputParser, Parsed, ToolCallDelta
from ..generation import Delta
from .answer import Answer, AnswerBody

NewParser = Callable[[], OutputParser]


class ParsedAnswer(Answer):
    """`new_parser`: makes that of one sequence; None where all text is content."""

    def __init__(self, body: AnswerBody, model: str, new_parser: NewParser | None):
        super().__init__(body, model)
        self.new_parser = new_parser
        self.parsers: dict[int, OutputParser] = {}

    def parsed(self, delta: Delta) -> Parsed:
        """What a delta says; all that is held back, too, with the last."""
        if self.new_parser is None:
            return Parsed(content=delta.text)
        index = delta.sequence.index
        parser = self.parsers.get(index)
        if parser is None:
            parser = self.parsers[index] = self.new_parser()
        parsed = parser.push(delta.text)
        if delta.finish_reason is not None:
            rest = parser.finish()
            parsed.content += rest.content
            parsed.reasoning += rest.reasoning
            parsed.tool_calls = _joined([*parsed.tool_calls, *rest.tool_calls])
        return parsed

    def ends_in_calls(self, delta: Delta) -> bool:
        """Whether a sequence has ended by itself, with calls for the client to make."""
        parser = self.parsers.get(delta.sequence.index)
        return delta.finish_reason == "stop" and parser is not None and parser.has_tool_calls


def _joined(deltas: Items[ToolCallDelta]) -> list[ToolCallDelta]:
    """One for each call."""
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        call = calls.setdefault(delta.index, delta)
        if call is not delta:
            call.arguments += delta.arguments
    return list(calls.values())
