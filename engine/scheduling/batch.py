"""ScheduledBatch: what one step computes, as the scheduler hands it to the runner, and what the runner hands back.

Each ScheduledRequest says: compute tokens [start, start + num_tokens) of `request`, whose KV blocks are already in
`request.block_tables`, one for each KV group, and whose recurrent state, if the model has one, in `request.state_slot`
(it is zero before token 0, whatever lies in the slot). If that reaches the end of its tokens, sample what comes next. A
prompt chunk, a whole prompt, a single decode token and a recomputation after preemption are all this same thing.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..messages import TokenLogprobs
from ..request import Request


@dataclass(slots=True)
class ScheduledRequest:
    request: Request
    start: int  # = request.num_computed_tokens when scheduled
    num_tokens: int
    state_from: int | None = None  # a snapshot that its state is read from; None: its own slot
    # (position, slot), in order: the state that the tokens before a position leave is written to that slot, too
    snapshots: list[tuple[int, int]] = field(default_factory=list)
    is_long: bool = field(init=False)  # the request's when scheduled
    end: int = field(init=False)
    samples: bool = field(init=False)  # whether this step produces new tokens for the request

    def __post_init__(self) -> None:
        self.end, self.is_long = self.start + self.num_tokens, self.request.is_long
        self.samples = self.end == self.request.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return self.request.token_ids[self.start : self.end]

    @property
    def last_seen(self) -> list[int]:
        """The last position that each token attends to: its own, or the end of its image."""
        found = list(range(self.start, self.end))
        for image in self.request.images:
            for run in image.whole:
                for position in range(max(run.start, self.start), min(run.stop, self.end)):
                    found[position - self.start] = run.stop - 1
        return found

    @property
    def looks_ahead(self) -> bool:
        """Whether a token attends to one behind it."""
        return any(
            run.start < self.end and self.start < run.stop
            for image in self.request.images
            for run in image.whole
        )

    def slots(self, block_size: int, group: int) -> list[int]:
        """Where in a KV group's cache their keys and values go: block * block_size + offset."""
        table = self.request.block_tables[group]
        return [
            table[p // block_size] * block_size + p % block_size
            for p in range(self.start, self.end)
        ]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    items: list[ScheduledRequest]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(slots=True)
class StepResult:
    """The runner's answer, keyed by request_id.

    A request is in `tokens` exactly if its item `samples`, it wants tokens and did not fail: with one or more tokens,
    the first of which stands at position item.end. The keys and values of all but the last of them have been computed,
    too, as far as the request's blocks reach.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    # What a grammar wants behind `tokens`. Nothing of these has been computed.
    forced: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # one for each of tokens
    # One entry per computed prompt position p in the chunk, scoring token p + 1; the scheduler strings chunks together.
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    # Of requests with params.pooling, in place of tokens: one for each whose item samples
    embeddings: dict[str, bytes] = field(default_factory=dict)
    errors: dict[str, str] = field(
        default_factory=dict
    )  # this request failed (NaN logits); its batch-mates did not


@runtime_checkable
class PendingStep(Protocol):
    """A step that the device still computes. The next one may be launched before its result is asked for."""

    def result(self) -> StepResult:
        """Wait for it. Raises what the step raised on the device."""
        ...
