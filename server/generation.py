"""One HTTP request's generations: every prompt n times, as one stream of Deltas.

    prompts x n  ->  engine.generate  ->  Detokenizer  ->  Delta(index = prompt * n + sample)

The generators are nested without a task in between where there is one sequence, and merged through one queue where
there are more. Closing `deltas()` closes them all, and that aborts their engine requests.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from ..engine.client import EngineDeadError, child_params
from ..engine.detokenizer import Detokenizer
from ..engine.messages import RequestOutput, TokenLogprobs
from ..engine.request import FinishReason, SamplingParams
from . import errors
from .serving import Serving


class Delta(msgspec.Struct, gc=False):
    """News of one sequence. `text` may be empty while bytes of a character or of a stop string are held back."""

    index: int
    text: str
    logprobs: list[TokenLogprobs] | None
    offsets: list[int]  # with logprobs: where in the sequence's text each token starts, in characters
    finish_reason: str | None


class Sequence:
    """One sample of one prompt, while it runs and after."""

    __slots__ = ("index", "num_cached_tokens", "num_tokens", "params", "prompt_logprobs", "prompt_token_ids")

    def __init__(self, index: int, prompt_token_ids: list[int], params: SamplingParams):
        self.index, self.prompt_token_ids, self.params = index, prompt_token_ids, params
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None


class Generation:
    """The sequences of one HTTP request. The caller has admitted `len(sequences)` of them."""

    def __init__(self, serving: Serving, prompts: list[list[int]], params: SamplingParams, n: int, salt: bytes,
                 arrival: float):
        """`arrival` is time.perf_counter() at the request's arrival."""
        self.serving, self.salt, self.arrival = serving, salt, arrival
        self.prompts, self.n = prompts, n
        self.id = uuid.uuid4().hex
        samples = [child_params(params, sample) for sample in range(n)]
        self.sequences = [Sequence(i * n + j, prompt, samples[j]) for i, prompt in enumerate(prompts) for j in range(n)]
        metrics = serving.metrics
        metrics.params_n.observe(n)
        metrics.params_max_tokens.observe(params.max_tokens)

    def usage(self) -> dict:
        """The usage object so far: each prompt counted once, however often it was sampled."""
        return usage(sum(map(len, self.prompts)), sum(s.num_tokens for s in self.sequences),
                     sum(s.num_cached_tokens for s in self.sequences[::self.n]))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every sequence's deltas, interleaved as they come. Raises ApiError if a sequence fails or the engine dies."""
        streams = [self._run(sequence) for sequence in self.sequences]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        try:
            async with aclosing(merged) as deltas:
                async for delta in deltas:
                    yield delta
        except EngineDeadError:
            raise errors.engine_dead() from None

    async def collect(self) -> list[Delta]:
        """Every sequence whole, as one Delta each, in the order of their indices."""
        texts: list[list[str]] = [[] for _ in self.sequences]
        whole = [Delta(s.index, "", None, [], None) for s in self.sequences]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                texts[delta.index].append(delta.text)
                done = whole[delta.index]
                if delta.logprobs:
                    done.logprobs = (done.logprobs or []) + delta.logprobs
                    done.offsets += delta.offsets
                done.finish_reason = delta.finish_reason
        for done, pieces in zip(whole, texts, strict=True):
            done.text = "".join(pieces)
        return whole

    async def _run(self, sequence: Sequence) -> AsyncGenerator[Delta, None]:
        serving, metrics = self.serving, self.serving.metrics
        detokenizer = Detokenizer(serving.tokenizer, sequence.params, sequence.prompt_token_ids)
        outputs = serving.engine.generate(f"{self.id}-{sequence.index}", sequence.prompt_token_ids, sequence.params,
                                          self.salt)
        last = self.arrival
        async with aclosing(outputs):
            async for output in outputs:
                now = time.perf_counter()
                if output.token_ids:
                    (metrics.itl if sequence.num_tokens else metrics.ttft).observe(now - last)
                    last = now
                delta = _advance(sequence, detokenizer, output)
                metrics.generation_tokens.inc(len(output.token_ids))
                if delta.finish_reason is not None:
                    self._record(sequence, delta.finish_reason, now)
                    yield delta
                    return
                yield delta

    def _record(self, sequence: Sequence, finish_reason: str, now: float) -> None:
        metrics = self.serving.metrics
        metrics.prompt_tokens.inc(len(sequence.prompt_token_ids))
        metrics.prompt_tokens_cached.inc(sequence.num_cached_tokens)
        metrics.finished(finish_reason, len(sequence.prompt_token_ids), sequence.num_tokens, now - self.arrival)


def usage(prompt: int, completion: int, cached: int) -> dict:
    """OpenAI's usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached}}


def _advance(sequence: Sequence, detokenizer: Detokenizer, output: RequestOutput) -> Delta:
    """Take in one engine output. The sequence ends when the engine says so or a stop string is found."""
    reason = output.finish_reason
    if reason == FinishReason.ERROR:
        raise errors.internal(output.error or "The engine failed on this request.")
    if reason == FinishReason.ABORT:
        raise errors.unavailable("The server is shutting down; this request was cut off.", retry_after=10)
    before = len(detokenizer.token_offsets)
    sequence.num_cached_tokens = output.num_cached_tokens or sequence.num_cached_tokens
    if output.prompt_logprobs is not None:
        sequence.prompt_logprobs = output.prompt_logprobs
    text = detokenizer.push(output.token_ids)
    pushed = len(detokenizer.token_offsets) - before  # fewer than came, if a stop string ended the text
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


async def _merge(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All streams' deltas in order of arrival; the first exception of any of them ends all."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
