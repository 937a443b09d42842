"""Calls with the arguments written as literals, which are made into JSON as they come.

    [get_weather(city="Paris", days=3, metric=True)]                            pythonic (Llama 4, LFM2, Olmo 3)
    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>       gemma4
    <start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>    functiongemma

One reader for both: a dialect says how strings are quoted, and how names stand before their values.
"""

import re

import msgspec

from .answer import Answer
from .feed import SPACE, Feed, Sink, Steps, marks, result
from .json_text import UNICODE_ESCAPE, json_call, more_json_calls, unicode_escape
from .typed import escaped, to_json

_NAME = re.compile(r"[\w.\-]*")
_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_HEX = re.compile(r"[0-9a-fA-F]{2}")
_WORDS = {
    "True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"
}  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_PLAIN = "\\'\"/"  # escaped, they are themselves
_BETWEEN = re.compile(r"[\s,;\])]*")  # calls of one list
_CLOSING = re.compile(r"[\])]")
_MAX_DEPTH = 64


class Dialect(msgspec.Struct, frozen=True):
    """How values are written."""

    quotes: tuple[str, ...]
    word: re.Pattern[
        str
    ]  # a value that is neither a string nor a list: a number, True, or a string without quotes
    is_python: bool  # strings have escapes, and may have three quotes
    equals: str  # between a name and its value, in a call
    arguments_end: str


PYTHON = Dialect(('"', "'"), re.compile(r"[\w.+\-]*"), True, "=", ")")
GEMMA = Dialect(('<|"|>', '"'), re.compile(r"[^,{}\[\]<]*"), False, ":", "}")
FUNCTION_GEMMA = msgspec.structs.replace(GEMMA, quotes=("<escape>",))


def arguments(answer: Answer, name: str, dialect: Dialect) -> Steps[bool]:
    """The arguments of a call, after the bracket that opens them. The call has begun when one of them or the closing
    bracket has come."""
    feed, write = answer.feed, answer.calls.write
    yield from feed.run(SPACE)
    if (yield from feed.match(dialect.arguments_end)):
        answer.begin_call(name)
        write("{}")
        return True
    key = yield from _argument_name(feed, dialect)
    if not key or not (yield from feed.peek()):
        return False
    answer.begin_call(name)
    between = "{"
    while key:
        write(f"{between}{to_json(key)}: ")
        between = ", "
        if not (yield from _literal(feed, write, dialect, 0)):
            return True
        yield from feed.run(SPACE)
        comma = yield from feed.match(",")
        yield from feed.run(SPACE)
        if (yield from feed.match(dialect.arguments_end)):
            write("}")
            return True
        key = (yield from _argument_name(feed, dialect)) if comma else ""
    return True


def _argument_name(feed: Feed, dialect: Dialect) -> Steps[str]:
    """The name of an argument and what stands between it and the value; "" if there is none."""
    quote = "" if dialect.is_python else (yield from feed.match(*dialect.quotes))
    name = yield from feed.word(_NAME)
    if quote and not (yield from feed.match(quote)):
        return ""
    yield from feed.run(SPACE)
    if not name or not (yield from feed.match(dialect.equals)):
        return ""
    yield from feed.run(SPACE)
    return name


def _literal(feed: Feed, sink: Sink, dialect: Dialect, depth: int) -> Steps[bool]:
    """One value, as JSON; whether it is complete."""
    quote = yield from feed.match(*dialect.quotes)
    if quote:
        sink('"')
        ended = yield from _string(feed, lambda text: sink(escaped(text)), dialect, quote)
        sink('"' if ended else "")
        return ended
    bracket = yield from feed.match("[", "(", "{")
    if bracket:
        if depth == _MAX_DEPTH:
            return False
        if bracket == "{":
            return (yield from _mapping(feed, sink, dialect, depth + 1))
        return (yield from _list(feed, sink, dialect, depth + 1, ")" if bracket == "(" else "]"))
    word = (yield from feed.word(dialect.word)).strip()
    if not word or not (yield from feed.peek()):
        sink(word)  # which may be the beginning of another
        return False
    sink(_word_as_json(word))
    return True


def _list(feed: Feed, sink: Sink, dialect: Dialect, depth: int, end: str) -> Steps[bool]:
    between = "["
    while True:
        yield from feed.run(SPACE)
        if (yield from feed.match(end)):
            sink("[]" if between == "[" else "]")
            return True
        sink(between)
        between = ", "
        if not (yield from _literal(feed, sink, dialect, depth)):
            return False
        yield from feed.run(SPACE)
        if not (yield from feed.match(",")) and (yield from feed.peek()) != end:
            return False


def _mapping(feed: Feed, sink: Sink, dialect: Dialect, depth: int) -> Steps[bool]:
    between = "{"
    while True:
        yield from feed.run(SPACE)
        if (yield from feed.match("}")):
            sink("{}" if between == "{" else "}")
            return True
        sink(between)
        between = ", "
        if not (yield from _key(feed, sink, dialect)):
            return False
        sink(": ")
        if not (yield from _literal(feed, sink, dialect, depth)):
            return False
        yield from feed.run(SPACE)
        if not (yield from feed.match(",")) and (yield from feed.peek()) != "}":
            return False


def _key(feed: Feed, sink: Sink, dialect: Dialect) -> Steps[bool]:
    """The key of a mapping and the colon after it: always a string in JSON, and bare in Gemma's dialect."""
    sink('"')
    quote = yield from feed.match(*dialect.quotes)
    if quote:
        yield from _string(feed, lambda text: sink(escaped(text)), dialect, quote)
    else:
        yield from feed.word(_NAME, lambda text: sink(escaped(text)))
    sink('"')
    yield from feed.run(SPACE)
    colon = yield from feed.match(":")
    yield from feed.run(SPACE)
    return bool(colon)


def _string(feed: Feed, sink: Sink, dialect: Dialect, quote: str) -> Steps[bool]:
    """What a string says, after its opening quote; whether it ended."""
    if not dialect.is_python:
        return bool((yield from feed.upto(marks(quote), sink)))
    if (yield from feed.peek(2)) == quote * 2:
        yield from feed.take(2)
        quote *= 3
    while True:
        found = yield from feed.upto(marks(quote, "\\"), sink)
        if found != "\\":
            return bool(found)
        yield from _escape(feed, sink)


def _escape(feed: Feed, sink: Sink) -> Steps[None]:
    letter = yield from feed.take(1)
    if letter == "u":
        yield from unicode_escape(feed, sink)
    elif letter == "x" and _HEX.fullmatch((yield from feed.peek(2))):
        sink(chr(int((yield from feed.take(2)), 16)))
    elif letter == "U" and _is_code_point(digits := (yield from feed.peek(8))):
        yield from feed.take(8)
        sink(chr(int(digits, 16)))
    else:
        sink(_ESCAPES.get(letter, letter if letter in _PLAIN else "\\" + letter))


def _is_code_point(digits: str) -> bool:
    halves = UNICODE_ESCAPE.fullmatch(digits[:4]) and UNICODE_ESCAPE.fullmatch(digits[4:])
    code = int(digits, 16) if halves else 0xD800
    return code < 0x110000 and not 0xD800 <= code < 0xE000


def _word_as_json(word: str) -> str:
    """A number or a constant of Python or JSON as JSON; any other word is a string."""
    if word in _WORDS or _JSON_NUMBER.fullmatch(word):
        return _WORDS.get(word, word)
    for parse in (int, lambda digits: int(digits, 0), float):  # 07 and 1_000; 0x1F; .5
        try:
            number = parse(word)
        except ValueError:
            continue
        if number - number == 0:  # neither infinite nor no number
            return to_json(number)
    return to_json(word)


def python_json(text: str) -> str | None:
    """The JSON of a list or mapping in Python's syntax; None if the text is none."""
    feed = Feed()
    feed.append(text.strip())
    feed.end()
    pieces: list[str] = []
    is_whole = result(_literal(feed, pieces.append, PYTHON, 0)) and not result(feed.peek())
    return "".join(pieces) if is_whole else None


def pythonic_calls(answer: Answer, mark: str, end: str = "") -> Steps[bool]:
    """A list of calls, after its `[` or the mark before it, up to the closing mark if there is one. Some models write
    JSON between the same marks."""
    feed = answer.feed
    yield from feed.run(SPACE)
    if mark != "[" and (yield from feed.match("[")):
        yield from feed.run(SPACE)
    if mark != "[" and (yield from feed.match("{")):
        closing = (end,) if end else ()
        begun = yield from json_call(answer, strict=False)
        return begun and (yield from more_json_calls(answer, strict=False, close=closing))
    if not (yield from _pythonic_call(answer)):
        return False
    while True:
        space: list[str] = []
        yield from feed.run(_BETWEEN, space.append)
        if end and (yield from feed.match(end)):
            return True
        if not (yield from _begins_call(feed)):
            answer.content.write(_CLOSING.sub("", "".join(space)))
            return True
        if not (yield from answer.attempt(_pythonic_call(answer), "", answer.content)):
            return True


def _begins_call(feed: Feed) -> Steps[bool]:
    following = yield from feed.peek()
    return following.isidentifier()


def _pythonic_call(answer: Answer) -> Steps[bool]:
    name = yield from answer.feed.word(_NAME)
    if not name or not (yield from answer.feed.match("(")):
        return False
    return (yield from arguments(answer, name, PYTHON))


def gemma_calls(answer: Answer, mark: str, dialect: Dialect, end: str) -> Steps[bool]:
    """One call, after its opening mark: `call:name{...}` and the closing mark."""
    feed = answer.feed
    yield from feed.run(SPACE)
    if not (yield from feed.match("call:")):
        return False
    name = yield from feed.word(_NAME)
    if not name or not (yield from feed.match("{")):
        return False
    begun = yield from arguments(answer, name, dialect)
    if begun:
        yield from feed.run(SPACE)
        yield from feed.match(end)
    return begun
