"""What one answer has said so far, and the loop that tells its content, its reasoning and its calls apart.

    prompt ...<think>\\n | I need the weather.\\n</think>\\n\\n | Let me look.\\n | <tool_call>...</tool_call>
                        | reasoning                          | content       | calls

Invariant: no text is lost and none is made up. A mark that begins no call after all comes out as the text that it is.
A call has begun once its name is known and its arguments have opened: from there on what comes is arguments, as the
model wrote them, also where the answer breaks off or they are no JSON. White space next to a mark belongs to neither
side, so it is left out; between two parts of the content it is kept.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from .feed import SPACE, Feed, Steps, marks


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call. `parameters`: the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any] = {}

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> "Tool":
        """Of one entry of `tools`, as OpenAI writes it: {"type": "function", "function": {...}}."""
        function = tool.get("function", tool)
        return cls(function["name"], function.get("parameters") or {})


class ToolCallDelta(msgspec.Struct):
    """One call's news: its id and name once, together; then pieces of the JSON text of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Parsed(msgspec.Struct):
    """What has become certain since the last time."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []


class TextWriter:
    """A text without the white space next to marks. White space is held until what follows it is known."""

    def __init__(self, marked: bool = False):
        self.is_empty = True
        self._marked = marked  # nothing but white space has come since a mark
        self._space_is_complete = False  # there was white space before that mark: one is enough
        self._space: list[str] = []
        self._news: list[str] = []

    def write(self, text: str) -> None:
        start = len(text) - len(text.lstrip())
        end = max(start, len(text.rstrip()))
        self._write_space(text[:start])
        if start < end:
            self._news += [*self._space, text[start:end]]
            self._space = []
            self.is_empty = self._marked = self._space_is_complete = False
            self._write_space(text[end:])

    def _write_space(self, space: str) -> None:
        if space and not self._space_is_complete and not (self._marked and self.is_empty):
            self._space.append(space)

    def mark(self, between: str = "") -> None:
        """Here stands a mark. `between` is written where text comes before it and after it, if no space does."""
        self._marked = True
        if self.is_empty:
            self._space = []
        elif between and not self._space:
            self._space = [between]
        self._space_is_complete = bool(self._space)

    def end(self) -> None:
        if not self._marked:
            self._news += self._space
        self._space = []

    def take(self) -> str:
        news, self._news = self._news, []
        return "".join(news)


class CallWriter:
    """The calls of an answer: pieces of arguments are joined into one delta a call."""

    def __init__(self, new_id: Callable[[], str]):
        self.count = 0
        self._new_id = new_id
        self._news: list[tuple[ToolCallDelta, list[str]]] = []

    def begin(self, name: str) -> None:
        self._news.append((ToolCallDelta(self.count, self._new_id(), name), []))
        self.count += 1

    def write(self, text: str) -> None:
        """A piece of the last call's arguments."""
        if not self._news:
            self._news.append((ToolCallDelta(self.count - 1), []))
        self._news[-1][1].append(text)

    def take(self) -> list[ToolCallDelta]:
        news, self._news = self._news, []
        for delta, pieces in news:
            delta.arguments = "".join(pieces)
        return [delta for delta, _ in news if delta.name is not None or delta.arguments]


class Answer:
    """What readers share: the text, and where its parts go."""

    def __init__(self, tools: Sequence[Tool], new_call_id: Callable[[], str], after_mark: bool):
        """`after_mark`: the prompt ends in a mark that the content follows on."""
        self.feed = Feed()
        self.content = TextWriter(marked=after_mark)
        self.reasoning = TextWriter(marked=True)
        self.calls = CallWriter(new_call_id)
        self._parameters = {tool.name: tool.parameters for tool in tools}

    def begin_call(self, name: str) -> None:
        """From here on it is a call: what has been read of it cannot come out as content any more."""
        self.feed.release()
        self.content.mark()
        self.calls.begin(name)

    def parameters(self, name: str) -> Mapping[str, Any] | None:
        """The JSON schema of a tool's arguments; None for a name that is none of the tools'."""
        return self._parameters.get(name)

    def attempt(self, reader: Steps[bool], mark: str, otherwise: TextWriter) -> Steps[bool]:
        """Whether what follows a mark is a call, or several. If it is none, all of it is text."""
        self.feed.hold(mark)
        is_call = yield from reader
        if not is_call:
            otherwise.write(self.feed.release())
        return is_call


Reader = Callable[[Answer, str], Steps[bool]]  # after the mark; False if no call has begun


class OutputParser:
    """Parses one answer: push its text as it comes, then finish."""

    def __init__(self, answer: Answer, steps: Steps[None]):
        self._answer = answer
        self._steps = steps
        next(self._steps)  # up to where it needs text

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has begun."""
        return self._answer.calls.count > 0

    def push(self, text: str) -> Parsed:
        """What has become certain with this text."""
        if text:
            self._answer.feed.append(text)
            next(self._steps)
        return self._take()

    def finish(self) -> Parsed:
        """The rest, now that no more text comes. A call that has not begun is content."""
        self._answer.feed.end()
        for _ in self._steps:
            pass
        self._answer.content.end()
        self._answer.reasoning.end()
        return self._take()

    def _take(self) -> Parsed:
        answer = self._answer
        return Parsed(answer.content.take(), answer.reasoning.take(), answer.calls.take())


class Layout(msgspec.Struct, frozen=True):
    """Which marks an answer is to be searched for."""

    tool_marks: tuple[str, ...] = ()
    tool_starts: tuple[str, ...] = ()  # begin a call where nothing but white space comes before
    read_calls: Reader | None = None
    think_starts: tuple[str, ...] = ()
    think_ends: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # marks that mean nothing
    think_anywhere: bool = False  # its marks are no text, so reasoning may come after content too


def read_answer(answer: Answer, layout: Layout, in_reasoning: bool) -> Steps[None]:
    """All of an answer in which reasoning and calls stand between marks."""
    feed, content = answer.feed, answer.content
    anywhere = (*layout.think_starts, *layout.think_ends) if layout.think_anywhere else ()
    wanted = marks(*layout.tool_marks, *layout.ignored, *anywhere)
    if in_reasoning:
        yield from _read_reasoning(answer, layout)
    while True:
        while content.is_empty and (yield from _read_beginning(answer, layout)):
            pass
        mark = yield from feed.upto(wanted, content.write)
        if not mark:
            return
        yield from _read_marked(answer, layout, mark)


def _read_beginning(answer: Answer, layout: Layout) -> Steps[bool]:
    """What only counts before the content; whether there was any of it."""
    yield from answer.feed.run(SPACE, answer.content.write)
    early = (*layout.think_starts, *layout.think_ends, *layout.tool_starts)
    mark = yield from answer.feed.match(*early)
    if mark:
        yield from _read_marked(answer, layout, mark)
    return bool(mark)


def _read_marked(answer: Answer, layout: Layout, mark: str) -> Steps[None]:
    if mark in layout.think_starts:
        yield from _read_reasoning(answer, layout)
    elif mark in (*layout.think_ends, *layout.ignored):
        # of reasoning that was empty, or ended in the prompt
        answer.content.mark()
    elif layout.read_calls:
        reader = layout.read_calls(answer, mark)
        yield from answer.attempt(reader, mark, answer.content)


def _read_reasoning(answer: Answer, layout: Layout) -> Steps[None]:
    """Up to the end of the reasoning. Some models call a tool without ending it: the call ends it then."""
    answer.content.mark()
    answer.reasoning.mark()
    yield from answer.feed.run(SPACE, answer.reasoning.write)
    yield from answer.feed.match(*layout.think_starts)  # the prompt has it, and the model too
    wanted = marks(*layout.think_ends, *layout.tool_marks)
    while mark := (yield from answer.feed.upto(wanted, answer.reasoning.write)):
        if mark in layout.think_ends:
            break
        if layout.read_calls:
            reader = layout.read_calls(answer, mark)
            if (yield from answer.attempt(reader, mark, answer.reasoning)):
                break
    answer.reasoning.mark()


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)
