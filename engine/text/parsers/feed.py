"""The text of one answer as it arrives, read from the front; readers are generators that yield when they need more.

    [ read ............ | unread: what may yet become a mark, or what no reader has come to | not there yet ]

Invariants: what a reader does with a text does not depend on how it was cut into pieces, and every character is
looked at a bounded number of times. So a reader never looks further ahead than the longest mark that it knows, and
hands what is longer on to a sink, piece by piece.
"""

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields where more text is needed
Sink = Callable[[str], object]  # takes text that has become certain

SPACE = re.compile(r"\s*")


def ignore(text: str) -> None:
    """A sink for what carries no meaning, such as white space between the parts of a call."""


def result(steps: Steps[T]) -> T:
    """What steps return that need no more text."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


class Marks:
    """A set of strings to look for. None may be the beginning of another one."""

    def __init__(self, marks: Iterable[str]):
        self.all = frozenset(marks)
        self.find = re.compile("|".join(map(re.escape, sorted(self.all))) or r"(?!)").search
        self._prefixes = {mark[:n] for mark in self.all for n in range(len(mark))}
        self.longest = max(map(len, self.all), default=0)

    def is_begun(self, text: str) -> bool:
        """Whether text is a part of a mark that the mark begins with, perhaps none of it, and not all of it."""
        return text in self._prefixes

    def tail(self, text: str, start: int) -> int:
        """The length of the longest tail of text[start:] that a mark begins with."""
        longest = min(self.longest, len(text) - start)
        return next((n for n in range(longest, 0, -1) if text[-n:] in self._prefixes), 0)


@lru_cache(maxsize=512)
def marks(*texts: str) -> Marks:
    return Marks(texts)


class Feed:
    """A text that is read while it arrives."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._held: list[str] | None = None

    def append(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    def hold(self, text: str = "") -> None:
        """Keep `text` and all that is read from here, until `release`."""
        self._held = [text]

    def release(self) -> str:
        """What has been read since `hold`, which is kept no longer."""
        held, self._held = self._held, None
        return "".join(held or ())

    def upto(self, wanted: Marks, sink: Sink) -> Steps[str]:
        """Read up to the first of the marks, and the mark itself, which is returned; "" at the end of the text. What
        comes before it goes to the sink."""
        while True:
            found = wanted.find(self._text, self._at)
            if found:
                self._read(found.start(), sink)
                self._read(found.end(), ignore)
                return found.group()
            kept = 0 if self._ended else wanted.tail(self._text, self._at)
            self._read(len(self._text) - kept, sink)
            if self._ended:
                return ""
            yield

    def match(self, *texts: str) -> Steps[str]:
        """Read the one of the texts that comes next, and return it; "", and nothing is read, if none does. One that
        begins with another one must be named before it."""
        wanted = marks(*texts)
        while not self._ended and wanted.is_begun(self._text[self._at : self._at + wanted.longest]):
            yield
        found = next((text for text in texts if self._text.startswith(text, self._at)), "")
        self._read(self._at + len(found), ignore)
        return found

    def run(self, pattern: re.Pattern[str], sink: Sink = ignore) -> Steps[None]:
        """Read as many characters as the pattern takes: one class of characters, repeated."""
        while True:
            found = pattern.match(self._text, self._at)
            self._read(found.end() if found else self._at, sink)
            if self._at < len(self._text) or self._ended:
                return
            yield

    def word(self, pattern: re.Pattern[str], sink: Sink = ignore) -> Steps[str]:
        """The same, returned as well. For what is short: names, numbers."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        text = "".join(pieces)
        sink(text)
        return text

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters, which are not read; fewer at the end of the text."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at : self._at + count]

    def take(self, count: int, sink: Sink = ignore) -> Steps[str]:
        """Read that many characters; fewer at the end of the text."""
        text = yield from self.peek(count)
        self._read(self._at + len(text), sink)
        return text

    def _read(self, end: int, sink: Sink) -> None:
        if end == self._at:
            return
        text = self._text[self._at : end]
        self._at = end
        if self._held is not None:
            self._held.append(text)
        sink(text)
