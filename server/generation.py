"""One HTTP request's generations: every prompt n times, as one series of Deltas.

    prompts x n  ->  engine.submit  ->  Detokenizer  ->  Delta(index = prompt * n + sample)

Everything from the engine's socket to `on_delta` is one plain call, without a task or a queue in between. `close`
aborts what still runs; after it, nothing is called any more.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial

import msgspec

from ..engine.client import EngineDeadError, child_params
from ..engine.messages import RequestOutput, TokenLogprobs
from ..engine.request import FinishReason, SamplingParams
from ..engine.text.detokenizer import Detokenizer
from . import errors
from .serving import Serving

log = logging.getLogger(__name__)


class Delta(msgspec.Struct, gc=False):
    """News of one sequence. `text` may be empty while bytes of a character or of a stop string are held back."""

    index: int
    text: str
    logprobs: list[TokenLogprobs] | None
    offsets: list[
        int
    ]  # with logprobs: where in the sequence's text each token starts, in characters
    finish_reason: str | None


class Sequence:
    """One sample of one prompt, while it runs and after."""

    __slots__ = (
        "index",
        "is_done",
        "last_time",
        "num_cached_tokens",
        "num_tokens",
        "params",
        "prompt_logprobs",
        "prompt_token_ids",
    )

    def __init__(self, index: int, prompt_token_ids: list[int], params: SamplingParams):
        self.index, self.prompt_token_ids, self.params = index, prompt_token_ids, params
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.last_time: float | None = None  # time.perf_counter() at the last token
        self.is_done = False


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
    ):
        """`arrival` is time.perf_counter() at the request's arrival."""
        self.serving, self.salt, self.arrival = serving, salt, arrival
        self.prompts, self.n = prompts, n
        self.id = uuid.uuid4().hex
        samples = [child_params(params, sample) for sample in range(n)]
        self.sequences = [
            Sequence(i * n + j, prompt, samples[j])
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]
        self.num_open = len(self.sequences)
        self.closed = False
        metrics = serving.metrics
        metrics.params_n.observe(n)
        metrics.params_max_tokens.observe(params.max_tokens)

    def usage(self) -> dict:
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

    def start(
        self, on_delta: Callable[[Delta], None], on_error: Callable[[errors.ApiError], None]
    ) -> None:
        """Generate: each sequence's deltas come in order, those of several interleaved, the last with a finish_reason.
        If a sequence fails or the engine dies, `on_error` hears it once, and that is the end of all."""
        self._on_delta, self._on_error = on_delta, on_error
        for sequence in self.sequences:
            detokenizer = Detokenizer(
                self.serving.tokenizer, sequence.params, sequence.prompt_token_ids
            )
            try:
                self.serving.engine.submit(
                    f"{self.id}-{sequence.index}",
                    sequence.prompt_token_ids,
                    sequence.params,
                    partial(self._take, sequence, detokenizer),
                    self.salt,
                )
            except EngineDeadError:
                self._fail(errors.engine_dead())
                return

    def close(self) -> None:
        """Abort the sequences that still run. Must be called at the end, however it came; more often does no harm."""
        if not self.closed:
            self.closed = True
            for sequence in self.sequences:
                self.serving.engine.abort(f"{self.id}-{sequence.index}")

    async def collect(self) -> list[Delta]:
        """Every sequence whole, as one Delta each, in the order of their indices. Raises ApiError."""
        texts: list[list[str]] = [[] for _ in self.sequences]
        whole = [Delta(s.index, "", None, [], None) for s in self.sequences]
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(delta: Delta) -> None:
            texts[delta.index].append(delta.text)
            done = whole[delta.index]
            if delta.logprobs:
                done.logprobs = (done.logprobs or []) + delta.logprobs
                done.offsets += delta.offsets
            done.finish_reason = delta.finish_reason
            if self.is_done:
                end.set_result(None)

        try:
            self.start(take, end.set_exception)
            await end
        finally:
            self.close()
        for done, pieces in zip(whole, texts, strict=True):
            done.text = "".join(pieces)
        return whole

    def _take(
        self, sequence: Sequence, detokenizer: Detokenizer, output: RequestOutput | None
    ) -> None:
        """The engine's news of one sequence; None: it has died."""
        if self.closed or sequence.is_done:  # an abort of our own has its echo here
            return
        try:
            if output is None:
                raise errors.engine_dead()
            delta = _advance(sequence, detokenizer, output)
            self._measure(sequence, output, delta)
            if delta.finish_reason is not None:
                sequence.is_done = True
                self.num_open -= 1
                if output.finish_reason is None:  # a stop string: the engine would go on
                    self.serving.engine.abort(f"{self.id}-{sequence.index}")
            self._on_delta(delta)
        except errors.ApiError as error:
            self._fail(error)
        except Exception:
            log.exception("a generation failed")
            self._fail(errors.internal())

    def _fail(self, error: errors.ApiError) -> None:
        self.close()
        self._on_error(error)

    def _measure(self, sequence: Sequence, output: RequestOutput, delta: Delta) -> None:
        metrics, now = self.serving.metrics, time.perf_counter()
        if output.token_ids:
            (metrics.ttft if sequence.last_time is None else metrics.itl).observe(
                now - (sequence.last_time or self.arrival)
            )
            sequence.last_time = now
            metrics.generation_tokens.inc(len(output.token_ids))
        if delta.finish_reason is not None:
            self._record(sequence, delta.finish_reason, now)

    def _record(self, sequence: Sequence, finish_reason: str, now: float) -> None:
        metrics = self.serving.metrics
        metrics.prompt_tokens.inc(len(sequence.prompt_token_ids))
        metrics.prompt_tokens_cached.inc(sequence.num_cached_tokens)
        metrics.finished(
            finish_reason, len(sequence.prompt_token_ids), sequence.num_tokens, now - self.arrival
        )


def usage(prompt: int, completion: int, cached: int) -> dict:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _advance(sequence: Sequence, detokenizer: Detokenizer, output: RequestOutput) -> Delta:
    """Take in one engine output. The sequence ends when the engine says so or a stop string is found."""
    reason = output.finish_reason
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
    pushed = (
        len(detokenizer.token_offsets) - before
    )  # fewer than came, if a stop string ended the text
    sequence.num_tokens += pushed
    if detokenizer.stopped:
        reason = FinishReason.STOP
    elif reason is not None:
        text += detokenizer.finish()
        if detokenizer.stopped:
            reason = FinishReason.STOP
    if not output.logprobs:
        return Delta(sequence.index, text, None, [], reason)
    offsets = detokenizer.token_offsets[before:]
    return Delta(sequence.index, text, output.logprobs[:pushed], offsets, reason)
