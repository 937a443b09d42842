"""GrammarCompiler: grammars of requests, compiled in threads beside the engine's loop.

    text --_compiled--> LLMatcher, kept for others with the same text --deep_copy--> GrammarState of one request

What a grammar may cost is bounded by llguidance's own counters, not by a clock, so that the same grammar is refused on
every machine: the size of the grammar, the work of its lexer when it is built, the work of each mask.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..text.tokenizer import Tokenizer
from .state import GrammarState

_KEPT = 64  # compiled grammars
_THREADS = 2
_MAX_ERROR_CHARS = 500


class GrammarCompiler:
    """Of one model's tokenizer. Thread-safe."""

    def __init__(
        self,
        read_tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ):
        """vocab_size: columns of the model's logits."""
        self._read_tokenizer, self._vocab_size = read_tokenizer, vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock, self._tokenizer_lock = Lock(), Lock()

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """Made once; that takes half a second, for all of which no other thread runs."""
        tokenizer = self._read_tokenizer()
        size = max(self._vocab_size, tokenizer.vocab_size)
        files = tokenizer.backend.to_str()
        return LLTokenizer(files, n_vocab=size, eos_token=self._eos_token_ids or None)

    def compile(self, grammar: str) -> "Future[LLMatcher]":
        """Begin to compile. The result is as if nothing of the output were known yet; ValueError, fit for a client to
        read, if the grammar is wrong or beyond the limits."""
        with self._lock:
            found = self._kept.get(grammar)
            if found is None:
                found = self._kept[grammar] = self._threads.submit(self._compiled, grammar)
            self._kept.move_to_end(grammar)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def state(self, grammar: str) -> GrammarState:
        """For a new request; waits where the grammar is not compiled yet. ValueError as `compile` has it."""
        matcher = self.compile(grammar).result().deep_copy()
        return GrammarState(matcher, -(-self.tokenizer.vocab_size // 32))

    def _compiled(self, grammar: str) -> LLMatcher:
        with self._tokenizer_lock:
            tokenizer = self.tokenizer
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()  # what it builds for the first token is kept
        if matcher.is_error():
            raise ValueError(" ".join(matcher.get_error().split())[:_MAX_ERROR_CHARS])
        return matcher
