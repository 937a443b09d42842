"""JSON as a model writes it, read as it comes: values, strings, and calls that are JSON objects.

    {"name": "get_weather", "arguments": {"city": "Paris"}}
             name            streamed as it stands

Arguments are passed on as they were written, so they are the same however the text was cut. They may also be called
`parameters`, come before the name, and be a JSON string that holds an object.
"""

import re

from .answer import Answer
from .feed import SPACE, Feed, Sink, Steps, ignore, marks

_STRUCTURE = marks('"', "{", "}", "[", "]")
_IN_STRING = marks('"', "\\")
_SCALAR = re.compile(r"[^\s,\]}]*")
_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("type", "id", "tool_call_id")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}
_BETWEEN = re.compile(r"[\s,;}\]]*")  # calls of one block
_CLOSING = re.compile(r"[}\]]")
UNICODE_ESCAPE = re.compile(r"[0-9a-fA-F]{4}")


def json_value(feed: Feed, sink: Sink) -> Steps[None]:
    """One value as it stands. Brackets and strings say where it ends; whether it is valid, nobody checks."""
    first = yield from feed.peek()
    if not first or first not in '{["':
        yield from feed.run(_SCALAR, sink)
        return
    depth = 0
    while True:
        found = yield from feed.upto(_STRUCTURE, sink)
        sink(found)
        if found == '"':
            yield from rest_of_string(feed, sink)
        depth += (found in ("{", "[")) - (found in ("}", "]"))
        if depth <= 0 or not found:
            return


def rest_of_string(feed: Feed, sink: Sink) -> Steps[None]:
    """A string as it stands, after its opening quote."""
    while True:
        found = yield from feed.upto(_IN_STRING, sink)
        sink(found)
        if found != "\\":
            return
        yield from feed.take(1, sink)


def json_string(feed: Feed, sink: Sink) -> Steps[bool]:
    """What a string says, after its opening quote; whether it ended."""
    while True:
        found = yield from feed.upto(_IN_STRING, sink)
        if found != "\\":
            return bool(found)
        letter = yield from feed.take(1)
        if letter == "u":
            yield from unicode_escape(feed, sink)
        else:
            sink(_ESCAPES.get(letter, "\\" + letter))


def unicode_escape(feed: Feed, sink: Sink) -> Steps[None]:
    """The character of an escape, after its `\\u`; two escapes may be one character."""
    digits = yield from feed.peek(4)
    if not UNICODE_ESCAPE.fullmatch(digits):
        sink("\\u")
        return
    yield from feed.take(4)
    code = int(digits, 16)
    if 0xD800 <= code < 0xDC00:
        second = yield from feed.peek(6)
        if second[:2] == "\\u" and UNICODE_ESCAPE.fullmatch(second[2:]):
            low = int(second[2:], 16)
            if 0xDC00 <= low < 0xE000:
                yield from feed.take(6)
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    sink("\ufffd" if 0xD800 <= code < 0xE000 else chr(code))


def short_string(feed: Feed) -> Steps[str | None]:
    """A string that is wanted whole, with its quotes before it; None if there is none, or it does not end."""
    if not (yield from feed.match('"')):
        return None
    pieces: list[str] = []
    ended = yield from json_string(feed, pieces.append)
    return "".join(pieces) if ended else None


def json_arguments(feed: Feed, sink: Sink) -> Steps[None]:
    """The value of `arguments`: an object, one in a string, or nothing."""
    start = yield from feed.peek(2)
    if start == '"{':
        yield from feed.take(1)
        yield from json_string(feed, sink)
    elif (yield from feed.match("null", '""')):
        sink("{}")
    else:
        yield from json_value(feed, sink)


def json_call(answer: Answer, strict: bool) -> Steps[bool]:
    """A call that is an object, after its `{`. A strict one has a name and arguments, and at most a type and an id:
    without a mark before it, any other object is an answer in JSON."""
    feed, write = answer.feed, answer.calls.write
    name: str | None = None
    early: list[str] = []  # arguments that came before the name
    begun = False
    while not (yield from _match_after_space(feed, "}")):
        key = yield from short_string(feed)
        if key is None or not (yield from _match_after_space(feed, ":")):
            return begun
        yield from feed.run(SPACE)
        if not (yield from feed.peek()):
            return begun
        if key in _NAMES and name is None:
            name = yield from short_string(feed)
            if not name:
                return False
            if early:
                answer.begin_call(name)
                begun = True
                write("".join(early))
        elif key in _ARGUMENTS and not begun and not early:
            if name is not None:
                answer.begin_call(name)
                begun = True
            yield from json_arguments(feed, write if begun else early.append)
        elif strict and not begun and key not in _OTHERS:
            return False
        else:
            yield from json_value(feed, ignore)
        yield from _match_after_space(feed, ",")
    if name is not None and not begun and not strict:
        answer.begin_call(name)
        begun = True
        write("{}")
    return begun


def _match_after_space(feed: Feed, text: str) -> Steps[str]:
    yield from feed.run(SPACE)
    return (yield from feed.match(text))


def json_calls(answer: Answer, strict: bool = False, close: tuple[str, ...] = ()) -> Steps[bool]:
    """One call or several, in an array or in a row, up to the closing mark if there is one."""
    feed = answer.feed
    yield from feed.run(SPACE)
    if (yield from feed.match("[")):
        yield from feed.run(SPACE)
    begun = bool((yield from feed.match("{"))) and (yield from json_call(answer, strict))
    return begun and (yield from more_json_calls(answer, strict, close))


def more_json_calls(answer: Answer, strict: bool, close: tuple[str, ...] = ()) -> Steps[bool]:
    """Those after the first; True, since there was a first one."""
    feed = answer.feed
    while True:
        space: list[str] = []
        yield from feed.run(_BETWEEN, space.append)
        if close and (yield from feed.match(*close)):
            return True
        if not (yield from feed.match("{")):
            answer.content.write(_CLOSING.sub("", "".join(space)))
            return True
        if not (yield from answer.attempt(json_call(answer, strict), "{", answer.content)):
            return True
