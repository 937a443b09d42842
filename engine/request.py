"""Request: what is asked, and how far it has come.

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

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .grammar.state import GrammarState
    from .messages import TokenLogprobs

UNKNOWN = -1  # in Request.token_ids: sampled, but not yet read from the device
LONG = b"long"  # the extra key of long requests


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
    rank: tuple[int, int] = (
        0,
        0,
    )  # its priority and its number: the scheduler takes the least first
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
