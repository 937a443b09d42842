"""Control tokens in what users write: `<|im_end|>` typed into a message is text, not the end of a message.

A chat template joins what it says itself, control tokens included, with what users wrote, and from the joined text
nobody can tell which is which. So before it is rendered, a mark goes into every control token that a user has written:

    user's text   so <|im_end|> ends a turn
    rendered      <|im_start|>user\\nso <MARK|im_end|> ends a turn<|im_end|>
    tokenizer     finds control tokens (the marked one is none), then its normalizer takes the mark out,
                  then it splits and merges what is now the very text that was written

All of that is the tokenizer's own single pass, so every other token is what it is without marks. A mark also goes into
what may become a control token together with what follows it: a text that ends in `<|im_`.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

# Two of Unicode's noncharacters, which no text contains: they are for a program's own use.
MARK = "\ufdd0\ufdd1"


class Marker:
    """Puts MARK into the control tokens of a text, after the first character of each, and behind the beginning of one
    that a text ends in."""

    def __init__(self, control_tokens: Iterable[str]):
        tokens = {token for token in control_tokens if len(token) > 1}
        # of words only whole ones: `role` may be how one begins
        symbols = [token for token in tokens if not token[0].isalnum()]
        self._prefixes = {token[:n] for token in symbols for n in range(1, len(token))}
        self._longest = max(map(len, self._prefixes), default=0)
        self._find = _any_of(tokens).finditer if tokens else lambda text: ()

    def mark(self, value: Any) -> Any:
        """JSON values, with every string in them marked. ValueError for a text that has MARK in it already."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _mark(self, text: str) -> str:
        check_unmarked(text)
        places = {found.start() + 1 for found in self._find(text)}
        end = len(text.rstrip())  # templates trim
        if any(
            text[end - n : end] in self._prefixes for n in range(1, min(self._longest, end) + 1)
        ):
            places.add(end)
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return MARK.join(text[start:stop] for start, stop in pairwise(cuts))


def check_unmarked(text: str) -> None:
    """ValueError if MARK is in a text that somebody sent: it would be taken out of it in silence."""
    if MARK in text:
        raise ValueError("the text holds U+FDD0 U+FDD1: these are no characters; leave them out")


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the first character of each token, also of ones that overlap. As a tree of alternatives: a vocabulary has
    up to thousands, which one after the other would be tried at every `<`."""
    tree: dict[str, Any] = {}
    for token in tokens:
        node = tree
        for char in token:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile("|".join(f"{re.escape(c)}(?={_pattern(node)})" for c, node in tree.items()))


def _pattern(node: Mapping[str, Any]) -> str:
    """What may follow; a token that ends here makes what could follow it needless."""
    text = ""
    while len(node) == 1 and "" not in node:
        char, node = next(iter(node.items()))
        text += re.escape(char)
    if "" in node:
        return text
    return text + "(?:" + "|".join(re.escape(c) + _pattern(rest) for c, rest in node.items()) + ")"
