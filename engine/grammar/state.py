"""GrammarState: the grammar of one request, moved along its output tokens.

    output   [ t0 t1 t2 | f3 f4 ]       t: sampled under the mask; f: forced, where the grammar leaves one text
              num_tokens ........^      the matcher has taken in all of these

Invariant: the matcher knows exactly the first `num_tokens` tokens of the output. A row that samples what is known by
then needs no mask, and what it samples is nobody's news (scheduler.py).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarState:
    """Used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", num_words: int):
        """num_words: int32 words of a mask, a bit for each token."""
        self.matcher, self.num_words = matcher, num_words
        self.num_tokens = 0
        self.end: int | None = None  # tokens of output after which nothing may follow

    def is_asked(self, position: int) -> bool:
        """Whether output token `position` is the next, and not the end."""
        return position == self.num_tokens and self.end is None

    def is_over(self, num_tokens: int) -> bool:
        """Whether an output of so many tokens is complete, and nothing may follow."""
        return self.end is not None and num_tokens >= self.end

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return bool(self.matcher.is_accepting())

    def accept(self, token: int, position: int, jump: bool) -> list[int]:
        """Take in the token sampled as output token `position`. Returns those that must follow it, if `jump`: they
        are taken in, too."""
        if not self.is_asked(position):
            return []
        forced: list[int] = []
        if self.matcher.consume_token(token):
            self.num_tokens += 1
            if jump and not self.matcher.is_stopped():
                forced = self._jump()
        self.look()
        return forced

    def look(self) -> str:
        """Whether the end is reached. Returns what is wrong, if the grammar has run into a limit."""
        if self.matcher.is_error():
            return f"the grammar is too complex here: {self.matcher.get_error().splitlines()[0]}"
        if self.matcher.is_stopped():
            self.end = self.num_tokens
        return ""

    def _jump(self) -> list[int]:
        forced: list[int] = self.matcher.compute_ff_tokens()
        taken = self.matcher.try_consume_tokens(forced)
        self.num_tokens += taken
        return forced[:taken]
