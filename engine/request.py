"""SamplingParams and Request: what is asked, and how far it has come.

A request is a list of tokens, of which the first `num_computed_tokens` have their keys and values in the cache. There
are no phases: the scheduler's one job is to let the second number catch up with the first.

    token_ids   [ p p p p p p | o o o ]          p prompt, o output
    computed    [ x x x x x x | x x   ]          one more step computes the last o and samples the next
    block table [  7  |  2  | 11  ]              KV blocks of block_size tokens each, one table for each KV group

Where steps overlap, the last tokens may be UNKNOWN: the device computes the steps that sample them.
"""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from .grammar.structured_outputs import StructuredOutputs
from .pooling import Pooling

if TYPE_CHECKING:
    from .grammar.state import GrammarState
    from .messages import TokenLogprobs

UNKNOWN = -1  # in Request.token_ids: sampled, but not yet read from the device
LONG = b"long"  # the extra key of long requests


MAX_INT = 2**31 - 1  # of a count: it fits the int32 of a kernel
# Divisors of logits in float32: what is below would make infinities of them, then NaN.
MIN_TEMPERATURE, MIN_REPETITION_PENALTY = 1e-5, 0.01
_MAX_QUOTED = 200  # characters of a value that an error repeats


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
    repetition_penalty: float = 1.0  # over prompt and output tokens; 1: off
    presence_penalty: float = 0.0  # over output tokens, as OpenAI has it
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = (
        None  # top-n alternatives for each output token; 0: the chosen token alone
    )
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    # Give this of the prompt's hidden states, and no token: then max_tokens is 1
    pooling: Pooling | None = None

    def verify(self, vocab_size: int) -> None:
        """Raise ParameterError naming the first field that is out of range."""

        def need(ok: bool, field_name: str, want: str) -> None:
            if not ok:
                raise ParameterError(
                    field_name,
                    f"{field_name} must be {want}, got {_quoted(getattr(self, field_name))}",
                )

        need(1 <= self.max_tokens <= MAX_INT, "max_tokens", f"between 1 and {MAX_INT}")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        need(
            self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature <= 10.0,
            "temperature",
            f"0, or between {MIN_TEMPERATURE:g} and 10",
        )
        need(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        need(-1 <= self.top_k <= MAX_INT, "top_k", f"between 1 and {MAX_INT}, or 0 or -1 for off")
        need(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        need(
            MIN_REPETITION_PENALTY <= self.repetition_penalty <= 10.0,
            "repetition_penalty",
            f"between {MIN_REPETITION_PENALTY:g} and 10",
        )
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        need(
            all(0 <= t < vocab_size for t in self.stop_token_ids),
            "stop_token_ids",
            f"ids below {vocab_size}",
        )
        need(
            all(
                0 <= t < vocab_size and -100.0 <= b <= 100.0
                for t, b in (self.logit_bias or {}).items()
            ),
            "logit_bias",
            f"a map from token ids below {vocab_size} to numbers in [-100, 100]",
        )
        need(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        need(
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
            "prompt_logprobs",
            "between 0 and 20",
        )
        need(self.pooling is None or self.max_tokens == 1, "max_tokens", "1 where pooling is asked")


def _quoted(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # Python writes out no more than some 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the context is full
    ABORT = "abort"  # the client left, or the server is shutting down
    ERROR = "error"  # this request failed; its message is in RequestOutput.error


class Status(enum.Enum):
    WAITING = enum.auto()  # holds no blocks
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """One image of a prompt, whose embeddings stand in place of those of its tokens."""

    positions: list[int]  # of these tokens in the prompt, ascending
    digest: bytes  # SHA-256 of the file
    embeddings: Any  # a tensor [len(positions), hidden_size]
    # Runs of these positions whose tokens see each other, ahead too: one step computes a run to its end
    whole: tuple[range, ...] = ()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One sequence in the engine. `token_ids` and `num_computed_tokens` are advanced by the scheduler alone."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int]
    seed: int  # params.seed, or one drawn at admission: sampling is a function of (seed, position)
    arrival_time: float = 0.0
    extra_keys: tuple[bytes, ...] = ()  # what sets its cache apart: only equal ones share prefixes
    images: tuple[ImageSpan, ...] = ()  # in the order of the prompt
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    is_long: bool = False  # what its blocks hold is of more tokens than the scheduler's rope_switch
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    # One for each KV group while it holds blocks; kv_cache_manager.RELEASED stands where a window has passed.
    block_tables: list[list[int]] = field(default_factory=list)
    # Where its recurrent state lies while it holds blocks, of a model whose layers have one.
    state_slot: int | None = None
    state_from: int | None = None  # a snapshot that its next step goes on from, not its own slot
    fork: int = 0  # tokens whose keys and values were found when it was admitted, state or not
    passing_snapshot: bytes | None = None  # name of its newest within a prompt or an answer
    grammar: "GrammarState | None" = None  # what its output must be
    block_hashes: list[bytes] = field(default_factory=list)  # names of the blocks its tokens fill
    status: Status = Status.WAITING
    num_preemptions: int = 0
    # Of the chunks so far, until all are sent: None from then on, and where they were not asked for.
    prompt_logprobs: "list[TokenLogprobs] | None" = None
    pooled: Any = None  # with params.pooling: a tensor of the runner's, of the chunks so far
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id, where one of stop_token_ids ended it

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Without those that are UNKNOWN, which come last."""
        known = len(self.token_ids)
        while self.token_ids[known - 1] == UNKNOWN:
            known -= 1
        return known

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    def chunk_end(self, end: int) -> int:
        """Where a chunk ends that may reach up to `end`: it cuts no run of an image whose tokens see each other."""
        for image in self.images:
            for run in image.whole:
                if run.start < end < run.stop:
                    return run.start
        return end

    def become_long(self) -> None:
        """What is computed from now on shares nothing with what was."""
        self.is_long, self.block_hashes = True, []
        self.extra_keys = (*self.extra_keys, LONG)

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED
