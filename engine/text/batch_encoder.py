"""Many texts, or pairs of texts, to token ids at once. The tokenizer's own threads share the work.

A text is never tokenised much further than it may be long: what is beyond is known to be too much, or is cut off.
Cutting counts the special tokens at both ends, and of a pair the longer text gives first, as in transformers
("longest_first").
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import tokenizers

from .control_tokens import check_unmarked
from .tokenizer import Tokenizer, TooManyTokens, beginning

Encoded = tuple[
    list[int], int
]  # token ids; where those of a pair's second text begin, by type; 0: nowhere


Item = TypeVar("Item", str, tuple[str, str])


class TextTooLong(ValueError):
    """One of several texts has too many tokens: `index` says which, `found` how many."""

    def __init__(self, index: int, found: TooManyTokens):
        super().__init__(f"text {index}: {found}")
        self.index, self.found = index, found


class BatchEncoder:
    """One tokenizer, and how many tokens a text may have."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, truncate_to: int | None = None):
        """truncate_to: cut texts that are longer; None: TextTooLong for what is longer than max_tokens. ValueError
        where truncate_to has no room for the special tokens of a pair."""
        self.tokenizer, self.backend = tokenizer, tokenizer.backend
        self.max_tokens, self.truncate_to = max_tokens, truncate_to
        special = self.backend.num_special_tokens_to_add(True)
        if truncate_to is not None and truncate_to <= special:
            raise ValueError(f"must be more than the {special} special tokens")

    def texts(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """ValueError for lone surrogates."""

        def shorter(text: str, room: int) -> tokenizers.Encoding:
            room -= self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            encoding = self._plain(text, room)
            encoding.truncate(room)
            return self.backend.post_process(encoding, None, add_special_tokens)

        whole = self._whole(texts, add_special_tokens)
        return [encoding.ids for encoding in self._fitting(texts, whole, shorter)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """ValueError for lone surrogates."""

        def shorter(pair: tuple[str, str], room: int) -> tokenizers.Encoding:
            room -= self.backend.num_special_tokens_to_add(True)
            first, second = (self._plain(text, room) for text in pair)
            rooms = longest_first(len(first), len(second), room)
            for encoding, own in zip((first, second), rooms, strict=True):
                encoding.truncate(own)
            return self.backend.post_process(first, second, True)

        fitting = self._fitting(pairs, self._whole(pairs, True), shorter)
        return [(encoding.ids, _second_part(encoding.type_ids)) for encoding in fitting]

    def _whole(
        self, items: Sequence[str] | Sequence[tuple[str, str]], add_special_tokens: bool
    ) -> list[tokenizers.Encoding]:
        """All of them; of one that is far too long as much of it as shows that."""
        limit = self.max_tokens if self.truncate_to is None else self.truncate_to
        shown: list[str | tuple[str, str]] = []
        for item in items:
            parts = (item,) if isinstance(item, str) else item
            for part in parts:
                check_unmarked(part)
            begun = [beginning(self.tokenizer, part, limit) for part in parts]
            shown.append(begun[0] if isinstance(item, str) else (begun[0], begun[1]))
        try:
            return self.backend.encode_batch_fast(shown, add_special_tokens=add_special_tokens)
        except TypeError as error:  # lone surrogates
            raise ValueError(f"the text is no Unicode: {error}") from None

    def _fitting(
        self,
        items: Sequence[Item],
        whole: list[tokenizers.Encoding],
        shorter: Callable[[Item, int], tokenizers.Encoding],
    ) -> list[tokenizers.Encoding]:
        limit = self.max_tokens if self.truncate_to is None else self.truncate_to
        for index, encoding in enumerate(whole):
            if len(encoding) <= limit:
                continue
            if self.truncate_to is None:
                raise TextTooLong(index, TooManyTokens(limit + 1, at_least=True))
            whole[index] = shorter(items[index], limit)
        return whole

    def _plain(self, text: str, tokens: int) -> tokenizers.Encoding:
        """Without special tokens; at least its first `tokens` ones."""
        begun = beginning(self.tokenizer, text, tokens)
        return self.backend.encode_batch_fast([begun], add_special_tokens=False)[0]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept of so many in all."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if shorter > room // 2:
        half = room // 2
        return (half, room - half) if first <= second else (room - half, half)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


def _second_part(type_ids: list[int]) -> int:
    return type_ids.index(1) if 1 in type_ids else 0
