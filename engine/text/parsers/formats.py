"""What a format is: data and functions that make the parser of an answer, and the grammar that binds an answer."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from .answer import Answer, Layout, OutputParser, Reader, Tool, new_call_id, read_answer
from .feed import Steps
from .grammar import ANY_TEXT, Lark, one_of, without

ReadAll = Callable[[Answer, str], Steps[None]]  # an answer that follows on the end of that prompt
Rules = Callable[[Lark, Sequence[Tool], bool], str]  # calls of tools; True: of several at once
_SPACES = '(" " | "\\n"){0,4}'


class ToolFormat(msgspec.Struct, frozen=True):
    """How a family of models calls tools."""

    name: str
    read: Reader | None
    rules: Rules
    marks: tuple[str, ...] = ()  # each begins calls
    starts: tuple[str, ...] = ()  # the same, but only where nothing comes before
    inner_marks: tuple[str, ...] = ()  # what else may be a control token
    new_call_id: Callable[[], str] = new_call_id
    read_all: ReadAll | None = None  # for formats that have no text outside of marks

    @property
    def kept_tokens(self) -> frozenset[str]:
        """The control tokens that must stay in the text."""
        return frozenset((*self.marks, *self.inner_marks))


class ReasoningFormat(msgspec.Struct, frozen=True):
    """How a family of models thinks aloud."""

    name: str
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # marks around the content, which mean nothing
    tokens: tuple[str, ...] = ()  # control tokens that are not a whole mark
    is_anywhere: bool = False  # the marks are control tokens and no text, so they count everywhere
    is_assumed: bool = False  # the model thinks first, whether it or the prompt says so or not
    read_all: ReadAll | None = None
    before_content: Callable[[Lark], str] | None = (
        None  # for those: thoughts, and what opens the message
    )

    @property
    def kept_tokens(self) -> frozenset[str]:
        return frozenset((*self.starts, *self.ends, *self.ignored, *self.tokens))

    def is_open(self, prompt_tail: str) -> bool:
        """Whether an answer begins within reasoning: the prompt ends in its mark, or it is assumed to."""
        tail = prompt_tail.rstrip()
        return tail.endswith(self.starts) or (self.is_assumed and not tail.endswith(self.ends))

    def is_closed(self, prompt_tail: str) -> bool:
        """Whether the prompt has ended the reasoning already."""
        return bool(self.ends) and prompt_tail.rstrip().endswith(self.ends)


class OutputFormat(msgspec.Struct, frozen=True):
    """What a model's answers may hold besides content: calls, reasoning, both or neither."""

    tool: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @property
    def kept_tokens(self) -> frozenset[str]:
        """The control tokens that must stay in the text, for the parser to see them."""
        return frozenset().union(
            *(each.kept_tokens for each in (self.tool, self.reasoning) if each)
        )

    def parser(self, tools: Sequence[Tool] = (), prompt_tail: str = "") -> OutputParser:
        """A parser of one answer. `prompt_tail`: the end of the prompt, some hundred characters of it."""
        tool, reasoning = self.tool, self.reasoning
        after_mark = bool(reasoning and reasoning.is_closed(prompt_tail))
        answer = Answer(tools, tool.new_call_id if tool else new_call_id, after_mark)
        for each in (tool, reasoning):
            if each and each.read_all:
                return OutputParser(answer, each.read_all(answer, prompt_tail))
        layout = Layout(
            tool_marks=tool.marks if tool else (),
            tool_starts=tool.starts if tool else (),
            read_calls=tool.read if tool else None,
            think_starts=reasoning.starts if reasoning else (),
            think_ends=reasoning.ends if reasoning else (),
            ignored=reasoning.ignored if reasoning else (),
            think_anywhere=bool(reasoning and reasoning.is_anywhere),
        )
        is_open = bool(reasoning and reasoning.is_open(prompt_tail))
        return OutputParser(answer, read_answer(answer, layout, is_open))

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        named: str | None = None,
        parallel: bool = True,
        special_tokens: Mapping[str, int] | None = None,
        prompt_tail: str = "",
    ) -> str:
        """A grammar in llguidance's Lark: calls of these tools, at least one; of the named one only, and once, if there
        is a name. Reasoning may come before. `special_tokens`: the tokenizer's, with their ids.

        ValueError, fit for the client to read, if a schema asks for what the format's syntax cannot promise.
        """
        chosen = [tool for tool in tools if named in (None, tool.name)]
        if self.tool is None or not chosen:
            raise ValueError(
                "this model has no format for calls" if chosen else f"there is no tool {named!r}"
            )
        lark = Lark(special_tokens or {})
        try:
            calls = self.tool.rules(lark, chosen, parallel and named is None)
        except (
            TypeError,
            AttributeError,
            KeyError,
        ) as error:  # a keyword's value is of another type
            raise ValueError(f"the schema of a tool makes no sense: {error}") from error
        except RecursionError:
            raise ValueError("the schema of a tool is nested too deeply") from None
        return lark.written(f"{self._before(lark, prompt_tail)} {calls}".strip())

    def reasoning_grammar(self, special_tokens: Mapping[str, int], prompt_tail: str) -> str | None:
        """Lark, of the reasoning that an answer may begin with; None where it has none. The answer proper follows."""
        lark = Lark(special_tokens)
        if self.reasoning and self.reasoning.before_content:
            before = self.reasoning.before_content(lark)
        else:
            before = self._before(lark, prompt_tail)
        return lark.written(before) if before else None

    def _before(self, lark: Lark, prompt_tail: str) -> str:
        reasoning = self.reasoning
        if reasoning is None or reasoning.read_all or reasoning.is_closed(prompt_tail):
            return ""
        marks = self.tool.marks if self.tool else ()  # a call would end the reasoning
        thought = lark.upto(reasoning.ends[0], without(*marks) if marks else ANY_TEXT)
        ended = f"{thought} {lark.rule(_SPACES)}"
        if reasoning.is_open(prompt_tail):
            return ended
        return f"({lark.text(reasoning.starts[0])} {ended})?"


def calls_of(lark: Lark, tools: Sequence[Tool], rule: Callable[[Lark, Tool], str]) -> str:
    """A call of one of the tools."""
    return lark.rule(one_of(rule(lark, tool) for tool in tools))
