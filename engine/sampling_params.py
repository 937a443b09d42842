"""SamplingParams: how the tokens of an answer are chosen, and when it stops.

What is given as text (`bad_words`, `dry_sequence_breakers`) is found among tokens by `text/token_sequences.py` before
the engine sees it: the engine knows no text.
"""

from collections.abc import Iterator

import msgspec

from .grammar.structured_outputs import StructuredOutputs
from .pooling import Pooling

MAX_INT = 2**31 - 1  # of a count: it fits the int32 of a kernel
# Divisors of logits in float32: what is below would make infinities of them, then NaN.
MIN_TEMPERATURE, MIN_REPETITION_PENALTY = 1e-5, 0.01
# The error of a request whose own parameters stop it, perhaps in the middle of its answer
NOTHING_LEFT = "allowed_token_ids, bad_words, min_tokens and the grammar together leave no token"
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
_MAX_QUOTED = 200  # characters of a value that an error repeats
TokenSequences = tuple[tuple[int, ...], ...]
Check = tuple[bool, str, str]  # is it right, the field, what is wanted


class ParameterError(ValueError):
    """A field of SamplingParams is out of range. `field` is its name."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop. Text-level stops (`stop`) are found by the detokenizer, the rest by the
    engine. Validated by `verify`."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    typical_p: float = 1.0  # locally typical sampling (arXiv 2202.00666); 1: off
    top_n_sigma: float = 0.0  # so many deviations below the best (arXiv 2411.07641); 0 or -1: off
    # Exclude top choices: with this probability all tokens of at least the threshold go but the least of them
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0  # over prompt and output tokens; 1: off
    presence_penalty: float = 0.0  # over output tokens, as OpenAI has it
    frequency_penalty: float = 0.0
    # Don't repeat yourself: what would continue a repetition of more than dry_allowed_length tokens loses
    # dry_multiplier * dry_base ** (length - dry_allowed_length); llama.cpp's definition and defaults
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # tokens that are looked back on; -1: all
    dry_sequence_breakers: tuple[str, ...] = DRY_SEQUENCE_BREAKERS
    dry_breaker_ids: TokenSequences | None = None  # the same as tokens, once they are known
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None  # no others
    bad_words: tuple[str, ...] = ()  # texts that no answer holds
    bad_words_token_ids: TokenSequences | None = None  # the same as tokens, once they are known
    # top-n alternatives for each output token; 0: the chosen token alone
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = (
        0  # of requests that wait, and of those that blocks are taken from: the least first
    )
    structured_outputs: StructuredOutputs | None = None
    # Give this of the prompt's hidden states, and no token: then max_tokens is 1
    pooling: Pooling | None = None

    def verify(self, vocab_size: int) -> None:
        """Raise ParameterError naming the first field that is out of range."""
        for checks in (self._lengths(), self._filters(), self._penalties(), self._ids(vocab_size)):
            for is_right, field, want in checks:
                if not is_right:
                    got = _quoted(getattr(self, field))
                    raise ParameterError(field, f"{field} must be {want}, got {got}")

    def _lengths(self) -> Iterator[Check]:
        yield 1 <= self.max_tokens <= MAX_INT, "max_tokens", f"between 1 and {MAX_INT}"
        yield 0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens"
        without_tokens = self.pooling is None or self.max_tokens == 1
        yield without_tokens, "max_tokens", "1 where pooling is asked"
        yield _within(self.logprobs, 0, 20), "logprobs", "between 0 and 20"
        yield _within(self.prompt_logprobs, 0, 20), "prompt_logprobs", "between 0 and 20"
        yield _within(self.seed, -(2**63), 2**63 - 1), "seed", "a 64-bit integer"
        yield abs(self.priority) <= MAX_INT, "priority", f"between -{MAX_INT} and {MAX_INT}"

    def _filters(self) -> Iterator[Check]:
        warm = MIN_TEMPERATURE <= self.temperature <= 10.0
        yield (
            self.temperature == 0.0 or warm,
            "temperature",
            f"0, or between {MIN_TEMPERATURE:g} and 10",
        )
        yield 0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]"
        yield -1 <= self.top_k <= MAX_INT, "top_k", f"between 1 and {MAX_INT}, or 0 or -1 for off"
        yield 0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]"
        yield 0.0 < self.typical_p <= 1.0, "typical_p", "in (0, 1]"
        sigmas = self.top_n_sigma == -1 or 0.0 <= self.top_n_sigma <= 100.0
        yield sigmas, "top_n_sigma", "between 0 and 100, or -1 for off"
        yield 0.0 <= self.xtc_probability <= 1.0, "xtc_probability", "in [0, 1]"
        yield 0.0 <= self.xtc_threshold <= 1.0, "xtc_threshold", "in [0, 1]"

    def _penalties(self) -> Iterator[Check]:
        yield (
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= 10.0,
            "repetition_penalty",
            f"between {MIN_REPETITION_PENALTY:g} and 10",
        )
        yield -2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]"
        yield -2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]"
        yield 0.0 <= self.dry_multiplier <= 100.0, "dry_multiplier", "between 0 and 100"
        yield 1.0 <= self.dry_base <= 100.0, "dry_base", "between 1 and 100"
        lengths = 1 <= self.dry_allowed_length <= MAX_INT
        yield lengths, "dry_allowed_length", f"between 1 and {MAX_INT}"
        last = -1 <= self.dry_penalty_last_n <= MAX_INT
        yield last, "dry_penalty_last_n", f"between 0 and {MAX_INT}, or -1 for all"

    def _ids(self, vocab_size: int) -> Iterator[Check]:
        below = f"ids below {vocab_size}"
        yield _are_below(self.stop_token_ids, vocab_size), "stop_token_ids", below
        allowed = self.allowed_token_ids
        some = allowed is None or (len(allowed) > 0 and _are_below(allowed, vocab_size))
        yield some, "allowed_token_ids", f"one or more {below}"
        biases = (self.logit_bias or {}).items()
        yield (
            all(0 <= t < vocab_size and -100.0 <= b <= 100.0 for t, b in biases),
            "logit_bias",
            f"a map from token ids below {vocab_size} to numbers in [-100, 100]",
        )


def _within(value: int | None, low: int, high: int) -> bool:
    return value is None or low <= value <= high


def _are_below(ids: tuple[int, ...], vocab_size: int) -> bool:
    return all(0 <= i < vocab_size for i in ids)


def _quoted(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python writes out no more than some 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
