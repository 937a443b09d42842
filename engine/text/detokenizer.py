"""Detokenizer: tokens in, text out as early as it is certain, and the search for stop strings.

Two things hold text back, one after the other:

    tokens   [ ... context ... | emitted | pending ]     pending: decoding ends in U+FFFD, so a character may be cut
    text     [ emitted ................. | held    ]     held: the longest tail that may be the start of a stop string

The concatenated deltas are tokenizer.decode of all tokens, up to a stop string. Text is decoded over a sliding window
that starts a few tokens back, because some decoders treat the first token of a sequence in their own way (a leading
space is dropped); with `prompt_token_ids` the window starts in the prompt. Two offsets, as in text-generation-
inference's `decode_token`: tokenizers' DecodeStream does the same, but cannot be flushed and raises on texts that
change under it.
"""

from collections.abc import Sequence

from ..sampling_params import SamplingParams
from .tokenizer import Tokenizer

_CONTEXT = 6  # prompt tokens to start from
_MAX_PENDING = (
    8  # tokens; a character has at most 4 bytes, so longer runs are not text and are let go
)


class Detokenizer:
    """The text of one generation.

    stopped       a stop string was found; the text ends before it (after it, if params say so), the caller aborts
    stop_reason   that stop string
    token_offsets the position in the text, in characters, at which each token pushed began to be decoded
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        kept_ids: frozenset[int] = frozenset(),
    ):
        """kept_ids: special tokens that are text all the same, whatever params say."""
        self.stopped = False
        self.stop_reason: str | None = None
        self.token_offsets: list[int] = []
        self._tokenizer = tokenizer
        self._params = params
        self._silent_ids = _silent_ids(tokenizer, params)
        skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._skipped_ids = skipped - kept_ids if kept_ids else skipped
        self._decodes_special = bool(skipped & kept_ids) or not params.skip_special_tokens
        self._window = [t for t in prompt_token_ids[-_CONTEXT:] if t not in self._skipped_ids]
        self._num_read = len(self._window)  # tokens of the window whose text has been emitted
        self._read_text = self._decode(self._window)
        self._held = ""
        self._length = 0  # characters decoded so far, held ones included

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with these tokens. After a stop, tokens are ignored."""
        deltas = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.token_offsets.append(self._length)
            if token_id not in self._silent_ids and token_id not in self._skipped_ids:
                deltas.append(self._emit(self._next_text(token_id)))
        return "".join(deltas)

    def finish(self) -> str:
        """The rest of the text, when no more tokens will come: a cut character as U+FFFD, and what was held."""
        if self.stopped:
            return ""
        text = self._emit(self._advance_window(self._decode(self._window)))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _next_text(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._num_read < _MAX_PENDING:
            return ""
        return self._advance_window(text)

    def _advance_window(self, text: str) -> str:
        """What is new in the window's text; the window moves up to keep the tokens just read as context."""
        new = text[len(self._read_text) :]
        if new:
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
            self._read_text = self._decode(self._window)
            self._length += len(new)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, not self._decodes_special)

    def _emit(self, new: str) -> str:
        """Pass text on as far as it cannot be part of a stop string that began after min_tokens."""
        stops = self._params.stop
        if not stops or len(self.token_offsets) <= self._params.min_tokens:
            return new
        text = self._held + new
        found = _first_stop(text, stops)
        if found is None:
            keep = len(text) - _longest_partial(text, stops)
            self._held = text[keep:]
            return text[:keep]
        start, stop = found
        self.stopped, self.stop_reason, self._held = True, stop, ""
        return (
            text[: start + len(stop)] if self._params.include_stop_str_in_output else text[:start]
        )


def _silent_ids(tokenizer: Tokenizer, params: SamplingParams) -> frozenset[int]:
    """Tokens that end the generation and are no part of its text. They can only come last."""
    if params.include_stop_str_in_output:
        return frozenset()
    return frozenset(params.stop_token_ids) | frozenset(
        () if params.ignore_eos else tokenizer.eos_token_ids
    )


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop) of the stop string that is complete first; of several, the longest."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)


def _longest_partial(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of text that a stop string begins with."""
    longest = max(len(stop) for stop in stops) - 1
    tails = range(min(longest, len(text)), 0, -1)
    return next((n for n in tails if any(stop.startswith(text[-n:]) for stop in stops)), 0)
