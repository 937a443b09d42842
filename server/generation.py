"""One HTTP request's generations: every prompt n times.

    prompts x n  ->  engine.submit      news of one sequence  ->  advance  ->  Delta

The engine's news goes to whoever started the generation (openai/stream.py), which asks `advance` what it means: a plain
call, without a task or a queue. `close` aborts what still runs; after it, nothing means anything any more.
"""

import time
import uuid
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

import msgspec

from ..engine.client import EngineDeadError, child_params
from ..engine.messages import RequestOutput, TokenLogprobs
from ..engine.request import FinishReason
from ..engine.sampling_params import NOTHING_LEFT, SamplingParams
from ..engine.text.detokenizer import Detokenizer
from ..engine.text.tokenizer import Tokenizer
from . import errors
from .serving import Serving


class Sequence:
    """One sample of one prompt, while it runs and after."""

    __slots__ = (
        "detokenizer",
        "index",
        "is_done",
        "last_time",
        "num_cached_tokens",
        "num_tokens",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
    )

    def __init__(
        self,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        kept_ids: frozenset[int],
    ):
        self.index, self.prompt_token_ids, self.params = index, prompt_token_ids, params
        self.detokenizer = Detokenizer(tokenizer, params, prompt_token_ids, kept_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.last_time: float | None = None  # time.perf_counter() at the last token
        self.is_done = False

    def usage(self) -> dict[str, object]:
        return usage(len(self.prompt_token_ids), self.num_tokens, self.num_cached_tokens)


class Delta(msgspec.Struct, gc=False):
    """News of one sequence. `text` may be empty while bytes of a character or of a stop string are held back."""

    sequence: Sequence
    text: str
    logprobs: list[TokenLogprobs] | None
    offsets: list[
        int
    ]  # with logprobs: where in the sequence's text each token starts, in characters
    finish_reason: str | None


OnOutput = Callable[[Sequence, RequestOutput | None], None]


class Generation:
    """The sequences of one HTTP request. The caller has admitted `len(sequences)` of them."""

    def __init__(
        self,
        serving: Serving,
        prompts: list[list[int]],
        params: SamplingParams,
        n: int,
        salt: bytes,
        arrival: float,
        kept_ids: frozenset[int] = frozenset(),
        images: Items[bytes] = (),
    ):
        """`arrival`: time.perf_counter() at the request's arrival. `kept_ids`: special tokens that stay in texts.
        `images`: files, of every prompt."""
        self.serving, self.salt, self.arrival, self.images = serving, salt, arrival, images
        self.prompts, self.n = prompts, n
        self.id = uuid.uuid4().hex
        samples = [child_params(params, sample) for sample in range(n)]
        self.sequences = [
            Sequence(i * n + j, prompt, samples[j], serving.tokenizer, kept_ids)
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]
        self.num_open = len(self.sequences)
        self.closed = False
        metrics = serving.metrics
        metrics.params_n.observe(n)
        metrics.params_max_tokens.observe(params.max_tokens)

    def usage(self) -> dict[str, object]:
        """The usage object so far: each prompt counted once, however often it was sampled."""
        return usage(
            sum(map(len, self.prompts)),
            sum(s.num_tokens for s in self.sequences),
            sum(s.num_cached_tokens for s in self.sequences[:: self.n]),
        )

    @property
    def is_done(self) -> bool:
        """Every sequence has had its last delta."""
        return self.num_open == 0

    def start(self, on_output: OnOutput) -> None:
        """Generate. `on_output` hears the engine's news of each sequence in order, those of several interleaved, in the
        very call that brings them; it must not raise. ApiError if the engine is dead."""
        for sequence in self.sequences:
            try:
                self.serving.engine.submit(
                    self._request_id(sequence),
                    sequence.prompt_token_ids,
                    sequence.params,
                    partial(on_output, sequence),
                    self.salt,
                    self.images,
                )
            except EngineDeadError:
                raise errors.engine_dead() from None

    def close(self) -> None:
        """Abort the sequences that still run. Must be called at the end, however it came; more often does no harm."""
        if not self.closed:
            self.closed = True
            for sequence in self.sequences:
                self.serving.engine.abort(self._request_id(sequence))

    def advance(self, sequence: Sequence, output: RequestOutput | None) -> Delta | None:
        """What the engine's news (None: it has died) means for one sequence, whose last delta has a finish_reason.
        None once nobody cares: an abort of our own has its echo here. Raises ApiError if the sequence failed."""
        if self.closed or sequence.is_done:
            return None
        if output is None:
            raise errors.engine_dead()
        delta = _next_delta(sequence, output)
        self._measure(sequence, output, delta)
        if delta.finish_reason is not None:
            sequence.is_done = True
            self.num_open -= 1
            if output.finish_reason is None:  # a stop string: the engine would go on
                self.serving.engine.abort(self._request_id(sequence))
        return delta

    def _request_id(self, sequence: Sequence) -> str:
        return f"{self.id}-{sequence.index}"

    def _measure(self, sequence: Sequence, output: RequestOutput, delta: Delta) -> None:
        metrics, now = self.serving.metrics, time.perf_counter()
        if output.token_ids:
            (metrics.ttft if sequence.last_time is None else metrics.itl).observe(
                now - (sequence.last_time or self.arrival)
            )
            sequence.last_time = now
            metrics.generation_tokens.inc(len(output.token_ids))
        if delta.finish_reason is not None:
            metrics.prompt_tokens.inc(len(sequence.prompt_token_ids))
            metrics.prompt_tokens_cached.inc(sequence.num_cached_tokens)
            metrics.finished(
                delta.finish_reason,
                len(sequence.prompt_token_ids),
                sequence.num_tokens,
                now - self.arrival,
            )


def usage(prompt: int, completion: int, cached: int) -> dict[str, object]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _next_delta(sequence: Sequence, output: RequestOutput) -> Delta:
    """Take in one engine output. The sequence ends when the engine says so or a stop string is found."""
    detokenizer, reason = sequence.detokenizer, output.finish_reason
    if reason == FinishReason.ERROR and output.error == NOTHING_LEFT:
        raise errors.bad_request(NOTHING_LEFT, "allowed_token_ids")
    if reason == FinishReason.ERROR:
        raise errors.internal(output.error or "The engine failed on this request.")
    if reason == FinishReason.ABORT:
        raise errors.unavailable(
            "The server is shutting down; this request was cut off.", retry_after=10
        )
    before = len(detokenizer.token_offsets)
    sequence.num_cached_tokens = output.num_cached_tokens or sequence.num_cached_tokens
    if output.prompt_logprobs is not None:
        sequence.prompt_logprobs = output.prompt_logprobs
    text = detokenizer.push(output.token_ids)
    # Fewer than came, if a stop string ended the text.
    pushed = len(detokenizer.token_offsets) - before
    sequence.num_tokens += pushed
    if detokenizer.stopped:
        reason = FinishReason.STOP
    elif reason is not None:
        text += detokenizer.finish()
        if detokenizer.stopped:
            reason = FinishReason.STOP
    if not output.logprobs:
        return Delta(sequence, text, None, [], reason)
    offsets = detokenizer.token_offsets[before:]
    return Delta(sequence, text, output.logprobs[:pushed], offsets, reason)
